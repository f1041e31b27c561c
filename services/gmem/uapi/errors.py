"""Why an operation failed: one Reason, and from it errno, gRPC status and class.

A core raises a class of this file with a Reason. The class says what the caller does
next; the row of the Reason gives the errno Linux returns (per lineage) and the gRPC
status that generic tools understand. Servers encode from the table, clients decode
from it, documents print it.

    KernelError                    anything an emulated kernel refuses; an OSError
      BadRequest                   fix the call
      Unsupported                  do not retry: this lineage or host cannot
      NoSuchObject                 open, create or bind it again
      ObjectExists                 use another name or range
      NotFaultable                 convert the page first
      Exhausted                    grow the pool, or free something
      Contended                    drop the references named, then redo the step
      InUse                        tear down what depends on it
      Poisoned                     replace the page
      PeerRestarted                another service began a new life: start again
    TransportError                 no answer was heard: same request_id, again
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final

from gmem.uapi.lineage import Lineage


class Errno(IntEnum):
    """Linux errno values, spelled out: CPython 3.11 knows no EHWPOISON."""

    EPERM = 1
    ENOENT = 2
    EINTR = 4
    EIO = 5
    EBADF = 9
    EAGAIN = 11
    ENOMEM = 12
    EACCES = 13
    EFAULT = 14
    EBUSY = 16
    EEXIST = 17
    ENODEV = 19
    EINVAL = 22
    EMFILE = 24
    ENOTTY = 25
    ENOSPC = 28
    EDEADLK = 35
    EOPNOTSUPP = 95
    ETIMEDOUT = 110
    ESTALE = 116
    EHWPOISON = 133


class Reason(StrEnum):
    """The cause of a refusal: stable, and finer than errno."""

    # The call itself.
    RANGE_UNALIGNED = "RANGE_UNALIGNED"
    RANGE_EMPTY = "RANGE_EMPTY"
    RANGE_NEGATIVE = "RANGE_NEGATIVE"
    RANGE_WRAPS = "RANGE_WRAPS"
    RANGE_PAST_END = "RANGE_PAST_END"
    SIZE_INVALID = "SIZE_INVALID"
    PAGE_SIZE_UNKNOWN = "PAGE_SIZE_UNKNOWN"
    FLAG_UNKNOWN = "FLAG_UNKNOWN"
    FLAG_COMBINATION = "FLAG_COMBINATION"
    ARGUMENT_INVALID = "ARGUMENT_INVALID"
    NODE_UNKNOWN = "NODE_UNKNOWN"
    MEMPOLICY_INVALID = "MEMPOLICY_INVALID"
    REQUEST_ID_MISSING = "REQUEST_ID_MISSING"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    STREAM_LENGTH = "STREAM_LENGTH"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"  # noqa: S105 - a reason, not a secret
    # Objects.
    HANDLE_UNKNOWN = "HANDLE_UNKNOWN"
    VM_UNKNOWN = "VM_UNKNOWN"
    VM_EXISTS = "VM_EXISTS"
    VCPU_UNKNOWN = "VCPU_UNKNOWN"
    VCPU_EXISTS = "VCPU_EXISTS"
    INODE_UNKNOWN = "INODE_UNKNOWN"
    FOLIO_UNKNOWN = "FOLIO_UNKNOWN"
    FRAME_UNKNOWN = "FRAME_UNKNOWN"
    OPERATION_UNKNOWN = "OPERATION_UNKNOWN"
    CGROUP_UNKNOWN = "CGROUP_UNKNOWN"
    CGROUP_EXISTS = "CGROUP_EXISTS"
    FOLIO_STATE = "FOLIO_STATE"
    HOLDER_UNKNOWN = "HOLDER_UNKNOWN"
    TOKEN_UNKNOWN = "TOKEN_UNKNOWN"  # noqa: S105 - a reason, not a secret
    TOKEN_DENIED = "TOKEN_DENIED"  # noqa: S105 - a reason, not a secret
    DESCRIPTOR_UNKNOWN = "DESCRIPTOR_UNKNOWN"
    DESCRIPTOR_TYPE = "DESCRIPTOR_TYPE"
    FD_UNKNOWN = "FD_UNKNOWN"
    FDS_EXHAUSTED = "FDS_EXHAUSTED"
    CLIENTS_EXHAUSTED = "CLIENTS_EXHAUSTED"
    REVISION_COMPACTED = "REVISION_COMPACTED"
    # Memslots and bindings.
    MEMSLOT_OVERLAP = "MEMSLOT_OVERLAP"
    MEMSLOT_UNKNOWN = "MEMSLOT_UNKNOWN"
    MEMSLOT_IMMUTABLE = "MEMSLOT_IMMUTABLE"
    MEMSLOT_CHANGING = "MEMSLOT_CHANGING"
    BINDING_OVERLAP = "BINDING_OVERLAP"
    BINDING_FOREIGN_VM = "BINDING_FOREIGN_VM"
    BINDING_BROKEN = "BINDING_BROKEN"
    BINDING_MISSING = "BINDING_MISSING"
    USERSPACE_ELSEWHERE = "USERSPACE_ELSEWHERE"
    GPA_OUTSIDE_MEMSLOTS = "GPA_OUTSIDE_MEMSLOTS"
    ATTRIBUTE_UNSUPPORTED = "ATTRIBUTE_UNSUPPORTED"
    # Unsupported.
    MODE_UNSUPPORTED = "MODE_UNSUPPORTED"
    MMAP_UNSUPPORTED = "MMAP_UNSUPPORTED"
    IOCTL_UNKNOWN = "IOCTL_UNKNOWN"
    TARGET_UNSUPPORTED = "TARGET_UNSUPPORTED"
    OPERATION_UNSUPPORTED = "OPERATION_UNSUPPORTED"
    # Memory.
    POOL_EMPTY = "POOL_EMPTY"
    SUBPOOL_EMPTY = "SUBPOOL_EMPTY"
    NODE_EMPTY = "NODE_EMPTY"
    BASE_MEMORY_EMPTY = "BASE_MEMORY_EMPTY"
    VMEMMAP_RESTORE_FAILED = "VMEMMAP_RESTORE_FAILED"
    CGROUP_LIMIT = "CGROUP_LIMIT"
    LIMIT_REACHED = "LIMIT_REACHED"
    # Pages.
    PAGE_NOT_FAULTABLE = "PAGE_NOT_FAULTABLE"
    PAGE_IN_USE = "PAGE_IN_USE"
    PAGE_PREPARED = "PAGE_PREPARED"
    PAGE_POISONED = "PAGE_POISONED"
    PAGE_UNREADABLE = "PAGE_UNREADABLE"
    # Life.
    OBJECT_IN_USE = "OBJECT_IN_USE"
    VCPU_RUNNING = "VCPU_RUNNING"
    INTERRUPTED = "INTERRUPTED"
    DEADLINE = "DEADLINE"
    STATE_WRONG = "STATE_WRONG"
    GUEST_GONE = "GUEST_GONE"
    PEER_RESTARTED = "PEER_RESTARTED"
    INCARNATION_STALE = "INCARNATION_STALE"


class TransportError(OSError):
    """No core answered: the outcome of the call is unknown, or nobody is there.

    `service` and `target` name who did not answer; a mutating call may be repeated
    under its request_id.
    """

    def __init__(self, sentence: str, *, service: str = "", target: str = "") -> None:
        """Keep who did not answer beside the sentence that says so."""
        super().__init__(sentence)
        self.service = service
        self.target = target


class KernelError(OSError):
    """A refusal by an emulated kernel: a cause, a sentence, and the numbers.

    `errno` is what Linux returns for the cause in the lineage; `numbers` hold what a
    program needs to act (`error_offset`, `holders`, `available`, ...).
    """

    def __init__(
        self,
        reason: Reason,
        sentence: str,
        *,
        lineage: Lineage | None = None,
        **numbers: int | str,
    ) -> None:
        """Look up the errno of `reason` in `lineage`; keep the rest as given."""
        row = ERROR_TABLE[reason]
        assert type(self) is row.error_class, (reason, type(self).__name__)
        errno = errno_of(reason, lineage)
        super().__init__(int(errno), sentence)
        self.reason = reason
        self.sentence = sentence
        self.lineage = lineage
        self.numbers = numbers

    def __str__(self) -> str:
        """Write `EAGAIN (page_in_use): unsafe refcount error_offset=0x3000`."""
        name = Errno(self.errno).name if self.errno is not None else "?"
        words = [f"{name} ({self.reason.lower()}): {self.sentence}"]
        words += [f"{key}={_number(key, value)}" for key, value in self.numbers.items()]
        return " ".join(words)

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling with reason, lineage and numbers."""
        return _rebuild, (self.reason, self.sentence, self.lineage, self.numbers)


class BadRequest(KernelError):
    """The call cannot be right in any state: fix it."""


class Unsupported(KernelError):
    """This lineage, backend or host does not do that: do not retry."""


class NoSuchObject(KernelError):
    """Never issued, closed, or of an earlier incarnation: open or create it again."""


class ObjectExists(KernelError):
    """The name or range is taken: use another."""


class NotFaultable(KernelError):
    """The page is private, or past the end: convert it, or stay inside."""


class Exhausted(KernelError):
    """Something finite is used up: grow it, or give some back."""


class Contended(KernelError):
    """Others hold the pages: drop the references at `error_offset`, then try again."""


class InUse(KernelError):
    """The object's state forbids it: tear down or mend what the sentence names."""


class Poisoned(KernelError):
    """The page is lost to a memory error: replace it."""


class PeerRestarted(KernelError):
    """Another service began a new incarnation while it was asked: begin again."""


OPERATION_ERRORS: Final = (KernelError, TransportError)
"""What an effect may raise into an operation, which then undoes what it has done."""


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """What follows from a Reason: errno, gRPC status name, Python class."""

    reason: Reason
    errno: Errno
    status: str
    error_class: type[KernelError]


def _rows(
    errno: Errno, status: str, error_class: type[KernelError], *reasons: Reason
) -> list[ErrorRow]:
    return [ErrorRow(reason, errno, status, error_class) for reason in reasons]


_R = Reason
_ROWS: list[ErrorRow] = [
    *_rows(
        Errno.EINVAL,
        "INVALID_ARGUMENT",
        BadRequest,
        _R.RANGE_UNALIGNED,
        _R.RANGE_EMPTY,
        _R.RANGE_NEGATIVE,
        _R.RANGE_WRAPS,
        _R.RANGE_PAST_END,
        _R.SIZE_INVALID,
        _R.PAGE_SIZE_UNKNOWN,
        _R.FLAG_UNKNOWN,
        _R.FLAG_COMBINATION,
        _R.ARGUMENT_INVALID,
        _R.NODE_UNKNOWN,
        _R.MEMPOLICY_INVALID,
        _R.REQUEST_ID_MISSING,
        _R.REQUEST_ID_REUSED,
        _R.STREAM_LENGTH,
        _R.PAGE_TOKEN_INVALID,
        _R.DESCRIPTOR_TYPE,
        _R.MEMSLOT_UNKNOWN,
        _R.MEMSLOT_IMMUTABLE,
        _R.BINDING_OVERLAP,
        _R.BINDING_FOREIGN_VM,
        _R.USERSPACE_ELSEWHERE,
        _R.ATTRIBUTE_UNSUPPORTED,
        _R.FOLIO_STATE,
    ),
    *_rows(
        Errno.ENOENT,
        "NOT_FOUND",
        NoSuchObject,
        _R.HANDLE_UNKNOWN,
        _R.VM_UNKNOWN,
        _R.VCPU_UNKNOWN,
        _R.INODE_UNKNOWN,
        _R.FOLIO_UNKNOWN,
        _R.FRAME_UNKNOWN,
        _R.CGROUP_UNKNOWN,
        _R.OPERATION_UNKNOWN,
        _R.HOLDER_UNKNOWN,
        _R.TOKEN_UNKNOWN,
        _R.DESCRIPTOR_UNKNOWN,
        _R.GPA_OUTSIDE_MEMSLOTS,
    ),
    *_rows(Errno.EBADF, "NOT_FOUND", NoSuchObject, _R.FD_UNKNOWN),
    *_rows(
        Errno.EEXIST,
        "ALREADY_EXISTS",
        ObjectExists,
        _R.MEMSLOT_OVERLAP,
        _R.VM_EXISTS,
        _R.VCPU_EXISTS,
        _R.CGROUP_EXISTS,
        _R.PAGE_PREPARED,
    ),
    *_rows(
        Errno.EACCES,
        "PERMISSION_DENIED",
        NotFaultable,
        _R.PAGE_NOT_FAULTABLE,
        _R.TOKEN_DENIED,
    ),
    *_rows(Errno.EOPNOTSUPP, "UNIMPLEMENTED", Unsupported, _R.MODE_UNSUPPORTED),
    *_rows(Errno.EOPNOTSUPP, "UNIMPLEMENTED", Unsupported, _R.OPERATION_UNSUPPORTED),
    *_rows(Errno.EOPNOTSUPP, "UNIMPLEMENTED", Unsupported, _R.TARGET_UNSUPPORTED),
    *_rows(Errno.ENODEV, "UNIMPLEMENTED", Unsupported, _R.MMAP_UNSUPPORTED),
    *_rows(Errno.ENOTTY, "UNIMPLEMENTED", Unsupported, _R.IOCTL_UNKNOWN),
    *_rows(
        Errno.ENOMEM,
        "RESOURCE_EXHAUSTED",
        Exhausted,
        _R.POOL_EMPTY,
        _R.SUBPOOL_EMPTY,
        _R.NODE_EMPTY,
        _R.BASE_MEMORY_EMPTY,
        _R.VMEMMAP_RESTORE_FAILED,
        _R.CGROUP_LIMIT,
        _R.LIMIT_REACHED,
    ),
    *_rows(
        Errno.EMFILE,
        "RESOURCE_EXHAUSTED",
        Exhausted,
        _R.FDS_EXHAUSTED,
        _R.CLIENTS_EXHAUSTED,
    ),
    *_rows(Errno.EAGAIN, "ABORTED", Contended, _R.PAGE_IN_USE, _R.MEMSLOT_CHANGING),
    *_rows(Errno.EINTR, "ABORTED", Contended, _R.INTERRUPTED),
    *_rows(Errno.ETIMEDOUT, "ABORTED", Contended, _R.DEADLINE),
    *_rows(
        Errno.EBUSY,
        "FAILED_PRECONDITION",
        InUse,
        _R.OBJECT_IN_USE,
        _R.VCPU_RUNNING,
        _R.STATE_WRONG,
    ),
    *_rows(Errno.EIO, "FAILED_PRECONDITION", InUse, _R.BINDING_BROKEN, _R.GUEST_GONE),
    *_rows(
        Errno.EFAULT,
        "FAILED_PRECONDITION",
        InUse,
        _R.BINDING_MISSING,
        _R.PAGE_UNREADABLE,
    ),
    *_rows(Errno.ESTALE, "FAILED_PRECONDITION", InUse, _R.REVISION_COMPACTED),
    *_rows(Errno.EHWPOISON, "DATA_LOSS", Poisoned, _R.PAGE_POISONED),
    *_rows(
        Errno.ESTALE,
        "ABORTED",
        PeerRestarted,
        _R.PEER_RESTARTED,
        _R.INCARNATION_STALE,
    ),
]

ERROR_TABLE: dict[Reason, ErrorRow] = {row.reason: row for row in _ROWS}

# The 39-patch series refuses a mapped or pinned page as a bad argument; every later
# series answers EAGAIN.
ERRNO_OVERRIDES: dict[tuple[Reason, Lineage], Errno] = {
    (Reason.PAGE_IN_USE, Lineage.RFC_V1): Errno.EINVAL,
}


def errno_of(reason: Reason, lineage: Lineage | None = None) -> Errno:
    """Return the errno Linux gives for `reason`, in `lineage` where that matters."""
    if lineage is not None and (reason, lineage) in ERRNO_OVERRIDES:
        return ERRNO_OVERRIDES[reason, lineage]
    return ERROR_TABLE[reason].errno


def make_error(
    reason: Reason,
    sentence: str,
    *,
    lineage: Lineage | None = None,
    **numbers: int | str,
) -> KernelError:
    """Make the error of the class that the table gives `reason`."""
    error_class = ERROR_TABLE[reason].error_class
    return error_class(reason, sentence, lineage=lineage, **numbers)


def _rebuild(
    reason: Reason,
    sentence: str,
    lineage: Lineage | None,
    numbers: dict[str, int | str],
) -> KernelError:
    return make_error(reason, sentence, lineage=lineage, **numbers)


def _number(key: str, value: int | str) -> str:
    if isinstance(value, str):
        return repr(value)
    if key.endswith(("offset", "gpa", "address")):
        return hex(value)
    return str(value)
