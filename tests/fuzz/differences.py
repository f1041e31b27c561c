"""Where an emulated host answers a call of the fuzzer differently on purpose.

`number` is the entry of docs/deviations.md with cause and consequence. A row matches
one call under one condition with exactly these two results; every other difference is a
failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.fuzz.operations import Create, Mmap, Operation


@dataclass(frozen=True, slots=True)
class Difference:
    """One row; results as the player words them, `kernel` first."""

    number: int
    call: type[Operation]
    condition: str
    kernel: str
    emulator: str

    def __str__(self) -> str:
        return (
            f"deviation {self.number}: {self.call.__name__}, {self.condition}: "
            f"{self.kernel} in Linux, {self.emulator} here"
        )


DIFFERENCES: Final = (
    Difference(4, Mmap, "MAP_PRIVATE", "EINVAL", "0"),
    Difference(95, Create, "huge", "0", "ENOMEM"),
)


def find(
    rows: Sequence[Difference], operation: Operation, kernel: str, emulator: str
) -> Difference | None:
    """Return the row that a difference is, None where it is none."""
    for row in rows:
        if (
            isinstance(operation, row.call)
            and operation.condition == row.condition
            and (kernel, emulator) == (row.kernel, row.emulator)
        ):
            return row
    return None
