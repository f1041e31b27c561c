"""What a machine has of everything twice, and how the two are compared."""

from __future__ import annotations

from collections import Counter
from errno import errorcode
from typing import Any, ClassVar, Final

from hypothesis.stateful import RuleBasedStateMachine, invariant

from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, PgRange
from tests.model.cores import Cores, Ended
from tests.model.inode import Inode
from tests.model.reference import Reference
from tests.model.rules import Refused

CLIENTS: Final = ("loader", "device")


class Twofold(RuleBasedStateMachine):
    """The cores and the model of them, which `boot` makes."""

    lineage: ClassVar[Lineage]
    page_size: ClassVar[int]
    steps: ClassVar[Counter[str]] = Counter()
    cores: Cores
    model: Reference
    written: dict[Any, int]
    serial: int

    def same(self, ended: Ended, call: Any, *arguments: Any, **named: Any) -> Any:
        """Have the model do it too; both must end alike. None: both refused."""
        self.steps[call.__name__] += 1
        try:
            value = call(*arguments, **named)
        except Refused as refused:
            self.steps[f"{call.__name__} {errorcode[refused.errno]}"] += 1
            expected = Ended(refused.errno, refused.error_offset)
            value = None
        else:
            expected = Ended(value=ended.value)
            value = ended.value if value is None else value
        assert ended == expected, (call.__name__, arguments)
        return value

    def wrote(self, where: list[tuple[Inode, int]]) -> None:
        """Note what the cores have in pages that were just written."""
        content = self.cores.content()
        numbers = {id(inode): n for n, inode in self.model.inodes.items()}
        for inode, page in where:
            tag = content[numbers[id(inode)], page]
            assert tag not in self.written, "a store that did not arrive"
            self.serial += 1
            self.written[tag] = inode.content[page] = self.serial

    @invariant()
    def everything_agrees(self) -> None:
        """Compare all statistics, all pages; then call the checkers."""
        if not hasattr(self, "model"):
            return
        self.cores.check()
        self._memory_agrees()
        assert set(self.cores.host.guest_memfd.numbers) == {
            number for number, inode in self.model.inodes.items() if not inode.gone
        }
        for number, inode in self.model.inodes.items():
            if not inode.gone:
                self._inode_agrees(number, inode)
        content = {
            (number, page): serial
            for number, inode in self.model.inodes.items()
            for page, serial in inode.content.items()
        }
        found = {k: self.written.get(tag) for k, tag in self.cores.content().items()}
        assert found == content

    def _memory_agrees(self) -> None:
        pool = self.model.pool
        assert self.cores.free_base_pages == pool.base
        memory = self.cores.host.allocator
        for page_size, hugetlb in memory.hugetlb.items():
            found, ours = hugetlb.hstate, page_size == self.page_size
            assert found.nr_huge_pages == pool.nr * ours
            assert found.free_huge_pages == pool.free * ours
            assert found.resv_huge_pages == pool.resv * ours
            assert found.surplus_huge_pages == 0
        split = sum(
            folio.split
            for inode in self.model.inodes.values()
            for folio in (*inode.folios.values(), *inode.orphans)
        )
        saved = (pool.nr - split) * pool.vmemmap if pool.nr else 0
        assert memory.vmemmap.saved_pages == saved

    def _inode_agrees(self, number: int, inode: Inode) -> None:
        found = self.cores.inode(number).statistics()
        split = sum(folio.split for folio in inode.folios.values())
        assert found.split_folios == split
        assert found.whole_folios == len(inode.folios) - split
        assert found.orphaned_folios == len(inode.orphans)
        counts = inode.unit > 1 or inode.rules.counts_base_pages
        assert found.st_blocks == counts * len(inode.folios) * self.page_size // 512
        assert found.st_blksize == self.page_size
        assert found.i_size == inode.nr_pages * PAGE_SIZE
        assert found.rollback_warnings == inode.warnings
        assert found.file_open == inode.open
        runs = self.cores.inode(number).faultability.runs(PgRange(0, inode.nr_pages))
        shared = [
            range(r.pages.start, r.pages.stop) for r in runs if r.faultability == 2
        ]
        assert shared == inode.runs(range(inode.nr_pages), 1)
        table = self.cores.host.memory.tables[number]
        assert table.uptodate.count(1) == len(inode.ready)
        assert all(table.uptodate[page] for page in inode.ready)
        mapped = {key for key in table.mapped[0] if key[0] in CLIENTS}
        assert mapped == inode.mapped
