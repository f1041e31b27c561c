"""What the host of a history looks like, and the memory of its VMs."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import BootPool
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, order_of
from tests.sim.options import Options

VMS: Final = 2
_UNITS_PER_4K_SLOT: Final = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """Two equal VMs with folios of `page_size`; a *unit* is one of them.

    `one_file`: their memslots are bound to one file each, or to several.
    """

    page_size: int
    units_per_slot: int
    slots: int
    one_file: bool
    base_gfn: int

    @classmethod
    def draw(cls, random: Random, page_sizes: tuple[int, ...]) -> Shape:
        """Draw a shape: 2M mostly; 1G is small, as its tables are large."""
        kind = random.random()
        page_size = SIZE_2M if kind < 0.7 else PAGE_SIZE if kind < 0.93 else SIZE_1G
        if page_size not in page_sizes:
            page_size = page_sizes[0]
        scale = _UNITS_PER_4K_SLOT if page_size == PAGE_SIZE else 1
        huge = page_size == SIZE_1G
        return cls(
            page_size,
            units_per_slot=1 if huge else scale * random.randint(1, 3),
            slots=1 if huge else random.randint(1, 2),
            one_file=random.random() < 0.4,
            base_gfn=random.choice((0, 0, 0, 3)),
        )

    @property
    def unit(self) -> int:
        """The pages of a folio."""
        return 1 << order_of(self.page_size)

    @property
    def slot_pages(self) -> int:
        """The pages of a memslot."""
        return self.units_per_slot * self.unit


def boot(shape: Shape, options: Options, random: Random) -> HostMemory:
    """Boot a host whose pool has what the VMs want, or (small_pool) less."""
    if shape.page_size == PAGE_SIZE:
        return HostMemory([512])
    wanted = VMS * shape.slots * shape.units_per_slot
    if options.small_pool:
        wanted = random.randint((wanted + 1) // 2, wanted - 1)
    # The memmap takes one page of 64; nodes begin where folios of 2M do.
    pages = wanted * shape.unit
    pages += (pages // 60 + 64) // 512 * 512 + 512
    nodes = [pages]
    if shape.page_size == SIZE_2M and random.random() < 0.3:
        nodes = [pages // 1024 * 512 + 512, pages // 1024 * 512 + 1024]
    return HostMemory(nodes, [BootPool(shape.page_size, wanted)])
