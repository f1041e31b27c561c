"""The cases: plain functions, each with a line of the conformance list.

    @case("C087", lineages=(RFC_V2,), page_sizes=ALL_SIZES, needs=(Feature.GUESTS,))
    def a_page_goes_to_and_fro(scene: Scene) -> None:
        '''host writes, guest reads and writes, ...'''

A case runs once for each lineage, page size and variant that it names, on a Scene of
its own. A function may play several lines: it sees `scene.id`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from gmem.testing.conformance.kvm import Backend, Feature
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, format_size

if TYPE_CHECKING:
    from gmem.testing.conformance.scene import Scene

Body: TypeAlias = "Callable[[Scene], None]"

SMALL: Final = (PAGE_SIZE,)
HUGE: Final = (SIZE_2M, SIZE_1G)
ALL_SIZES: Final = (PAGE_SIZE, SIZE_2M, SIZE_1G)
NO_VARIANT: Final = ("",)


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the list, and the function that plays it."""

    id: str
    body: Body
    lineages: tuple[str, ...]
    page_sizes: tuple[int, ...]
    variants: tuple[str, ...]
    needs: frozenset[Feature]

    @property
    def title(self) -> str:
        """What it asks, in a line."""
        return (inspect.getdoc(self.body) or "").partition("\n")[0]


@dataclass(frozen=True, slots=True)
class Planned:
    """One run of a case."""

    case: Case
    lineage: str
    page_size: int
    variant: str

    @property
    def id(self) -> str:
        """The line of the list."""
        return self.case.id

    @property
    def name(self) -> str:
        """What tells it from other runs of its line in its lineage: `1G-pinned`."""
        words = [format_size(self.page_size), self.variant]
        return "-".join(word for word in words if word)

    def __str__(self) -> str:
        return f"{self.id}-{self.lineage}-{self.name}"


_CASES: Final[list[Case]] = []


def case(
    number: str,
    *,
    lineages: Sequence[str],
    page_sizes: Sequence[int] = SMALL,
    variants: Sequence[str] = NO_VARIANT,
    needs: Collection[Feature] = (),
) -> Callable[[Body], Body]:
    """Register a function as line `number` of the list; it may be given several."""

    def registered(body: Body) -> Body:
        _CASES.append(
            Case(
                number,
                body,
                tuple(lineages),
                tuple(page_sizes),
                tuple(variants),
                frozenset(needs),
            )
        )
        return body

    return registered


def all_cases() -> Sequence[Case]:
    """Return every case that was registered, by line."""
    return sorted(_CASES, key=lambda one: one.id)


def plan(
    backend: Backend | None = None,
    *,
    lineages: Collection[str] = (),
    ids: Collection[str] = (),
    known: Collection[str] = (),
) -> Iterator[Planned]:
    """Yield what is to be run, by lineage, then line.

    `lineages` and `ids` choose, empty means all. With a backend, what it has not is
    left out where the lineage or the page size is meant; a missing Feature is a skip,
    which the runner reports. Without one, `known` are the lineages.
    """
    sizes = backend.capabilities.page_sizes if backend else dict.fromkeys(known)
    for lineage, has in sizes.items():
        if lineages and lineage not in lineages:
            continue
        for one in all_cases():
            if lineage not in one.lineages or (ids and one.id not in ids):
                continue
            for page_size in one.page_sizes:
                if has is None or page_size in has:
                    for variant in one.variants:
                        yield Planned(one, lineage, page_size, variant)
