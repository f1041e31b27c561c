"""Where an emulated host answers differently on purpose.

One row per difference that a case can meet. `number` is the entry of
docs/deviations.md, which has cause and consequence. A row matches one call under one
condition with exactly these two results; everything else is a fail. A row that no case
met in a lineage, though those of its `cases` that the lineage has all ran, is a fail as
well: it has become untrue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gmem.testing.conformance.kvm import (
    IN_PLACE,
    LINEAGES,
    MAINLINE,
    RFC_V2,
    KillPolicy,
)


@dataclass(frozen=True, slots=True)
class Deviation:
    """One difference; `kernel` and `here` are results as `outcomes` writes them."""

    number: int
    call: str
    condition: str
    kernel: str
    here: str
    cases: tuple[str, ...]
    lineages: tuple[str, ...] = LINEAGES

    def __str__(self) -> str:
        return (
            f"deviation {self.number}: {self.call}, {self.condition}: "
            f"{self.kernel} in Linux, {self.here} here"
        )


_LATER: Final = (RFC_V2, IN_PLACE, MAINLINE)
"""In RFC_V1 a file that is not bound has no page that could be read."""

_EMULATOR: Final = (
    Deviation(1, "read", "on the file", "fails", "0", ("C001", "C070"), _LATER),
    Deviation(1, "write", "on the file", "fails", "0", ("C001", "C070"), _LATER),
    *(
        Deviation(81, "signal", f"{how}, dirty", "SIGBUS", "named alone", (number,))
        for how, number in (
            (KillPolicy.EARLY, "C104"),
            (KillPolicy.ADVICE, "C106"),
        )
    ),
    Deviation(4, "mmap", "MAP_PRIVATE", "EINVAL", "0", ("C072",)),
)

DEVIATIONS: Final[Mapping[str, Sequence[Deviation]]] = {"emulator": _EMULATOR}
"""By the name of the backend; one that is not here answers as the list says."""


def find(
    backend: str, lineage: str, call: str, condition: str, results: tuple[str, str]
) -> Deviation | None:
    """Return the deviation that a difference is, None where it is none.

    `results` are that of the kernel and that of the backend.
    """
    met = (call, condition, *results)
    for row in DEVIATIONS.get(backend, ()):
        if lineage in row.lineages and met == (
            row.call,
            row.condition,
            row.kernel,
            row.here,
        ):
            return row
    return None
