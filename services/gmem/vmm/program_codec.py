"""Guest programs from the wire: understood and bounded before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.device import nr_slots_of
from gmem.uapi.errors import BadRequest, InUse, Reason
from gmem.uapi.pages import U64_LIMIT
from gmem.vmm.codec import invalid
from gmem.vmm.core.exits import Access
from gmem.vmm.core.policy import Policy
from gmem.vmm.core.program import (
    Fill,
    Halt,
    Hash,
    Load,
    MapGpaRange,
    Operation,
    Out,
    Ring,
    Step,
    Store,
    Verify,
    Vmcall,
)

LOAD_BYTES_MAX: Final = 1 << 20
INSTRUCTIONS_MAX: Final = 4096
HYPERCALL_ARGS_MAX: Final = 4
"""rbx, rcx, rdx, rsi."""
PORTS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class RunOrder:
    """What the first request of a Run stream asks for."""

    vm: str
    vcpu: int
    program: list[Step]
    policy: Policy


def start_from_wire(request: pb.RunRequest | None) -> RunOrder:
    """Return what a Run stream begins with, its program checked.

    Raises InUse (STATE_WRONG), BadRequest (ARGUMENT_INVALID).
    """
    if request is None or request.WhichOneof("request") != "start":
        raise InUse(
            Reason.STATE_WRONG, "the first request of Run must be a start: send one"
        )
    start = request.start
    if len(start.program) > INSTRUCTIONS_MAX:
        raise invalid(
            f"{len(start.program)} instructions are more than {INSTRUCTIONS_MAX}: "
            "use several programs"
        )
    program = [_step(index, step) for index, step in enumerate(start.program)]
    policy = Policy(start.policy or Policy.NONE)
    return RunOrder(start.vm, start.vcpu, program, policy)


def resume_from_wire(request: pb.RunRequest) -> int:
    """Return what an exit is answered with. Raises InUse (STATE_WRONG)."""
    if request.WhichOneof("request") != "resume":
        raise InUse(
            Reason.STATE_WRONG, "the program has started: answer its exit with a resume"
        )
    return request.resume.value


def _step(index: int, instruction: pb.Instruction) -> Step:
    kind = instruction.WhichOneof("op")
    if kind is None or instruction.access not in pb.Access.values():
        raise invalid(f"instruction {index} is not understood: see Instruction")
    operation = getattr(instruction, kind)
    try:
        _CHECKS[kind](operation)
    except BadRequest as error:
        raise invalid(f"instruction {index} ({kind}): {error.sentence}") from error
    access = Access(instruction.access or Access.BY_ATTRIBUTE)
    return Step(_OPERATIONS[kind](operation), access)


def _check_range(gpa: int, size: int) -> None:
    if gpa + size >= U64_LIMIT:
        raise invalid(f"gpa {gpa:#x} plus {size:#x} bytes wraps: shorten it")


def _check_load(op: pb.Load) -> None:
    _check_range(op.gpa, op.size)
    if op.size > LOAD_BYTES_MAX:
        raise invalid(f"{op.size} bytes are more than {LOAD_BYTES_MAX}: load less")


def _check_byte(op: pb.Fill | pb.Verify) -> None:
    _check_range(op.gpa, op.size)
    if op.value > 0xFF:
        raise invalid(f"value {op.value} is no byte: use 0 to 255")


def _check_ring(op: pb.Ring) -> None:
    _check_range(op.gpa, op.size)
    nr_slots_of(op.size)


def _check_hypercall(op: pb.Hypercall) -> None:
    if len(op.args) > HYPERCALL_ARGS_MAX:
        raise invalid(f"{len(op.args)} arguments: give {HYPERCALL_ARGS_MAX} or fewer")


def _check_out(op: pb.Out) -> None:
    if op.port >= PORTS:
        raise invalid(f"port {op.port} is not below {PORTS}: use a smaller one")


def _check_nothing(op: object) -> None:
    del op


_CHECKS: Final[dict[str, Callable[[Any], None]]] = {
    "load": _check_load,
    "store": lambda op: _check_range(op.gpa, len(op.data)),
    "fill": _check_byte,
    "verify": _check_byte,
    "hash": lambda op: _check_range(op.gpa, op.size),
    "hypercall": _check_hypercall,
    "ring": _check_ring,
    "out": _check_out,
    "halt": _check_nothing,
    "map_gpa_range": _check_nothing,
}

_OPERATIONS: Final[dict[str, Callable[[Any], Operation]]] = {
    "load": lambda op: Load(op.gpa, op.size),
    "store": lambda op: Store(op.gpa, op.data),
    "fill": lambda op: Fill(op.gpa, op.size, op.value),
    "verify": lambda op: Verify(op.gpa, op.size, op.value),
    "hash": lambda op: Hash(op.gpa, op.size),
    "hypercall": lambda op: Vmcall(op.nr, tuple(op.args)),
    "map_gpa_range": lambda op: MapGpaRange(op.gpa, op.npages, op.private),
    "ring": lambda op: Ring(op.gpa, op.size, op.requests, op.timeout_ms),
    "out": lambda op: Out(op.port, op.value),
    "halt": lambda _: Halt(),
}
