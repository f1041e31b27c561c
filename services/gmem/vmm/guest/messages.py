"""What the vmm and its guest process say to each other over their socket pair.

A frame is two lengths, a JSON header `[kind, fields]` and a blob (bytes that JSON
cannot hold). Both ends are the same program of the same version, so there is no version
in it. Descriptors travel beside a frame that says `fds: 1`, in order.

The vmm sends in the order of its core's steps, and the guest process acts in the order
of arrival: a mapping told before a zap is in force when the zap takes it away, and one
told after it is current. The guest needs no other ordering than this.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, get_args

from gmem.vmm.core.exits import Access
from gmem.vmm.core.program import Operation, Step, Store, Vmcall

LENGTHS: Final = struct.Struct("<II")
FRAME_BYTES_MAX: Final = 1 << 28
RECEIVE_BYTES: Final = 1 << 18
_OPERATIONS: Final[dict[str, type[Any]]] = {
    kind.__name__: kind for kind in get_args(Operation)
}


@dataclass(frozen=True, slots=True)
class Message:
    """One thing said; subclasses are the vocabulary."""

    KINDS: ClassVar[dict[str, type[Message]]] = {}

    def encode(self) -> bytes:
        """Return the frame."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        blob: bytes = values.pop("blob", b"")
        header = json.dumps([type(self).__name__, values]).encode()
        return LENGTHS.pack(len(header), len(blob)) + header + blob


def _said(cls: type[Message]) -> type[Message]:
    Message.KINDS[cls.__name__] = cls
    return cls


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Guest: it runs, and obeys from now on."""


@dataclass(frozen=True, slots=True)
class MapWindow(Message):
    """Vmm: map the descriptor beside this from byte `offset` on."""

    window: int
    base_gfn: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class MapView(Message):
    """Vmm: take a guest view from the broker of guest_memfd, and map it."""

    window: int
    base_gfn: int
    size: int
    offset: int
    token: str
    broker_path: str


@dataclass(frozen=True, slots=True)
class WindowMapped(Message):
    """Guest: a window is there, or `problem` says why not."""

    window: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Unmap(Message):
    """Vmm: forget a window."""

    window: int


@dataclass(frozen=True, slots=True)
class Invalidated(Message):
    """Vmm: drop guest frames `[start, stop)`; the sequence is `seq` now."""

    seq: int
    in_progress: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class RunProgram(Message):
    """Vmm: vCPU `vcpu` begins the program in the blob as run `run`."""

    vcpu: int
    run: int
    blob: bytes


@dataclass(frozen=True, slots=True)
class Stop(Message):
    """Vmm: end run `run` at the next instruction, or chunk of one."""

    vcpu: int
    run: int


@dataclass(frozen=True, slots=True)
class Missed(Message):
    """Guest: an access found no mapping (a page fault)."""

    vcpu: int
    run: int
    instruction: int
    gfn: int
    npages: int
    access: int
    write: bool


@dataclass(frozen=True, slots=True)
class MapFrames(Message):
    """Vmm: guest frames `[start, stop)` are reached through `window`."""

    vcpu: int
    run: int
    start: int
    stop: int
    window: int
    private: bool
    writable: bool


@dataclass(frozen=True, slots=True)
class TryAgain(Message):
    """Vmm: an invalidation runs; ask again when the sequence is past `seq`."""

    vcpu: int
    run: int
    seq: int


@dataclass(frozen=True, slots=True)
class Emulate(Message):
    """Vmm: no memslot answers; leave with MMIO."""

    vcpu: int
    run: int


@dataclass(frozen=True, slots=True)
class Resume(Message):
    """Vmm: the exit was answered with `value`."""

    vcpu: int
    run: int
    value: int


@dataclass(frozen=True, slots=True)
class Left(Message):
    """Guest: instruction `instruction` left with the exit `kind` of `core.exits`."""

    vcpu: int
    run: int
    instruction: int
    kind: str
    values: dict[str, Any]
    blob: bytes = b""


@dataclass(frozen=True, slots=True)
class ResultOf(Message):
    """Guest: an instruction is done; the blob is the data of its result."""

    vcpu: int
    run: int
    instruction: int
    count: int
    first_gpa: int
    value: int
    blob: bytes


for _kind in (
    *(Hello, MapWindow, MapView, WindowMapped, Unmap, Invalidated),
    *(RunProgram, Stop, Missed, MapFrames, TryAgain, Emulate, Resume, Left, ResultOf),
):
    _said(_kind)


class Decoder:
    """Bytes of a stream in, messages out."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Add what was received; iterate over the messages that are now whole."""
        self._pending += data
        while (message := self._next()) is not None:
            yield message

    def _next(self) -> Message | None:
        if len(self._pending) < LENGTHS.size:
            return None
        header_bytes, blob_bytes = LENGTHS.unpack_from(self._pending)
        blob_at = LENGTHS.size + header_bytes
        end = blob_at + blob_bytes
        assert end <= FRAME_BYTES_MAX, end
        if len(self._pending) < end:
            return None
        header = bytes(self._pending[LENGTHS.size : blob_at])
        blob = bytes(self._pending[blob_at:end])
        del self._pending[:end]
        return _decode(header, blob)


def _decode(header: bytes, blob: bytes) -> Message:
    name, values = json.loads(header)
    kind = Message.KINDS[name]
    if any(field.name == "blob" for field in fields(kind)):
        values["blob"] = blob
    return kind(**values)


def encode_program(program: Sequence[Step]) -> bytes:
    """Return the blob of RunProgram."""
    return json.dumps([_spell(step) for step in program]).encode()


def decode_program(blob: bytes) -> list[Step]:
    """Read the blob of RunProgram."""
    return [
        Step(_operation(kind, values), Access(access))
        for kind, access, values in json.loads(blob)
    ]


def _spell(step: Step) -> tuple[str, int, dict[str, Any]]:
    operation = step.operation
    values = {f.name: getattr(operation, f.name) for f in fields(operation)}
    if isinstance(operation, Store):
        values["data"] = operation.data.hex()
    return type(operation).__name__, int(step.access), values


def _operation(kind: str, values: dict[str, Any]) -> Operation:
    if kind == "Store":
        return Store(values["gpa"], bytes.fromhex(values["data"]))
    if kind == "Vmcall":
        return Vmcall(values["nr"], tuple(values["args"]))
    operation: Operation = _OPERATIONS[kind](**values)
    return operation
