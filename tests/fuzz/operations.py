"""What the fuzzer does to a kernel: calls with every argument, and scripts of them.

Things have small numbers, the same on every kernel: files, windows (mappings), VMs,
memslots. An operation whose thing is not there does nothing and counts for nothing, so
that a script stays playable while it shrinks.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

FILES: Final = 3
WINDOWS: Final = 3
VMS: Final = 2
SLOTS: Final = 3
HUGE_BYTES: Final = 1 << 40
NO_FILE: Final = FILES
"""In Bind: a descriptor that is no guest_memfd."""


class Operation:
    """One call."""

    __slots__ = ()

    @property
    def condition(self) -> str:
        """What matters of the arguments where kernels differ on purpose."""
        return ""


@dataclass(frozen=True, slots=True)
class Create(Operation):
    """KVM_CREATE_GUEST_MEMFD; an older file of the number is closed first."""

    file: int
    vm: int
    size: int
    flags: int

    @property
    def condition(self) -> str:
        """How large it is."""
        return "huge" if self.size > HUGE_BYTES else ""


@dataclass(frozen=True, slots=True)
class Close(Operation):
    """close(2) of a file."""

    file: int


@dataclass(frozen=True, slots=True)
class Fstat(Operation):
    """fstat(2)."""

    file: int


@dataclass(frozen=True, slots=True)
class Fallocate(Operation):
    """fallocate(2)."""

    file: int
    mode: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Call(Operation):
    """A system call on the file's descriptor, by its name in `player.CALLS`."""

    file: int
    name: str

    @property
    def condition(self) -> str:
        """The name: the calls have nothing in common."""
        return self.name


@dataclass(frozen=True, slots=True)
class Mmap(Operation):
    """mmap(2); the window takes the place of an older one, unmapped first."""

    window: int
    file: int
    offset: int
    length: int
    prot: int
    flags: int

    @property
    def condition(self) -> str:
        """How it is shared."""
        return "MAP_PRIVATE" if self.flags & mmap.MAP_PRIVATE else "MAP_SHARED"


@dataclass(frozen=True, slots=True)
class Munmap(Operation):
    """munmap(2) of a window."""

    window: int


@dataclass(frozen=True, slots=True)
class Load(Operation):
    """Read bytes through a window."""

    window: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Survey(Operation):
    """Read all of a window that lies inside the file as it was created."""

    window: int


@dataclass(frozen=True, slots=True)
class Store(Operation):
    """Write bytes of one value through a window."""

    window: int
    offset: int
    size: int
    value: int


@dataclass(frozen=True, slots=True)
class Madvise(Operation):
    """madvise(2) of a part of a window."""

    window: int
    advice: int
    offset: int
    length: int

    @property
    def condition(self) -> str:
        """The advice."""
        return f"advice {self.advice}"


@dataclass(frozen=True, slots=True)
class Bind(Operation):
    """KVM_SET_USER_MEMORY_REGION2 with a file; `file` NO_FILE is a plain memfd."""

    vm: int
    slot: int
    flags: int
    gpa: int
    size: int
    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class Unbind(Operation):
    """KVM_SET_USER_MEMORY_REGION2 with size 0."""

    vm: int
    slot: int


KINDS: Final[dict[str, type[Operation]]] = {
    kind.__name__: kind
    for kind in (
        *(Create, Close, Fstat, Fallocate, Call, Mmap),
        *(Munmap, Load, Survey, Store, Madvise, Bind, Unbind),
    )
}


def write_script(path: Path, script: Sequence[Operation]) -> None:
    """Write one operation a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({"op": type(operation).__name__, **asdict(operation)})  # type: ignore[call-overload]
        for operation in script
    )
    path.write_text("".join(f"{line}\n" for line in lines))


def read_script(path: Path) -> list[Operation]:
    """Read what write_script wrote."""
    script: list[Operation] = []
    for line in path.read_text().splitlines():
        arguments = json.loads(line)
        script.append(KINDS[arguments.pop("op")](**arguments))
    return script
