"""Between the wire's messages and the core's values; the only place that knows both."""

from __future__ import annotations

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.api.types.v1 import types_pb2
from gmem.guest_memfd.core.memory_failure import KillPolicy, MemoryFailure
from gmem.guest_memfd.core.values import (
    Binding,
    Folio,
    Fragment,
    GuestFaultOutcome,
    GuestPage,
    Hold,
    HoldKind,
    InodeStatistics,
    MemPolicy,
    MemPolicyMode,
    MergeStatus,
    WrongAccess,
)
from gmem.uapi.errors import BadRequest, NoSuchObject, Reason
from gmem.uapi.flags import Faultability
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import NodeId, Pfn, PgRange

_POLICY_MODES = {
    types_pb2.MemPolicy.MODE_UNSPECIFIED: MemPolicyMode.DEFAULT,
    types_pb2.MemPolicy.MODE_DEFAULT: MemPolicyMode.DEFAULT,
    types_pb2.MemPolicy.MODE_BIND: MemPolicyMode.BIND,
    types_pb2.MemPolicy.MODE_PREFERRED: MemPolicyMode.PREFERRED,
    types_pb2.MemPolicy.MODE_INTERLEAVE: MemPolicyMode.INTERLEAVE,
}
_WIRE_MODES = {
    MemPolicyMode.DEFAULT: types_pb2.MemPolicy.MODE_DEFAULT,
    MemPolicyMode.BIND: types_pb2.MemPolicy.MODE_BIND,
    MemPolicyMode.PREFERRED: types_pb2.MemPolicy.MODE_PREFERRED,
    MemPolicyMode.INTERLEAVE: types_pb2.MemPolicy.MODE_INTERLEAVE,
}
_HOLD_KINDS = {
    pb.HOLD_KIND_PIN: HoldKind.PIN,
    pb.HOLD_KIND_PLAIN: HoldKind.PLAIN,
}
_MEANT = {
    pb.MEANT_PRIVATE: Faultability.GUEST,
    pb.MEANT_SHARED: Faultability.ALL,
}
_KILL_POLICIES = {
    pb.KILL_POLICY_UNSPECIFIED: KillPolicy.DEFAULT,
    pb.KILL_POLICY_EARLY: KillPolicy.EARLY,
    pb.KILL_POLICY_LATE: KillPolicy.LATE,
}
_WIRE_HOLD_KINDS = {kind: wire for wire, kind in _HOLD_KINDS.items()}


class Names:
    """Resource names of one host: hosts/{host}/guestMemfds/1, .../operations/1."""

    def __init__(self, host: str) -> None:
        self._host = f"hosts/{host}"
        self._prefix = f"{self._host}/guestMemfds/"
        self._operations = f"hosts/{host}/operations/"

    def of(self, inode: int) -> str:
        """Return the name of inode `inode`."""
        return f"{self._prefix}{inode}"

    def inode(self, name: str, *, unknown: Reason = Reason.INODE_UNKNOWN) -> int:
        """Return the inode number in `name`; NoSuchObject with `unknown` for others."""
        number = name.removeprefix(self._prefix)
        if name.startswith(self._prefix) and number.isascii() and number.isdecimal():
            return int(number)
        raise NoSuchObject(
            unknown,
            f"{name!r} names no guest_memfd; names read {self._prefix}1",
        )

    def file(self, name: str) -> int:
        """Return the inode number in a name that stands for a descriptor.

        BadRequest (DESCRIPTOR_TYPE) for what is a descriptor of something else: the
        host (/dev/kvm), a VM, a file that a client gave to a broker. NoSuchObject
        (FD_UNKNOWN) for what is none.
        """
        if name == self._host or name.startswith(
            (f"{self._host}/vms/", "descriptors/")
        ):
            raise BadRequest(
                Reason.DESCRIPTOR_TYPE,
                f"{name!r} is no guest_memfd; names read {self._prefix}1",
            )
        return self.inode(name, unknown=Reason.FD_UNKNOWN)

    def of_operation(self, number: int) -> str:
        """Return the name of operation `number`."""
        return f"{self._operations}{number}"

    def operation(self, name: str) -> int:
        """Return the operation number in `name`; NoSuchObject for others."""
        number = name.removeprefix(self._operations)
        if (
            name.startswith(self._operations)
            and number.isascii()
            and number.isdecimal()
        ):
            return int(number)
        raise NoSuchObject(
            Reason.OPERATION_UNKNOWN,
            f"{name!r} names no operation; names read {self._operations}1",
        )


def lineage_from_wire(word: str) -> Lineage:
    """Return the lineage called `word`; an empty word is RFC_V1."""
    try:
        return Lineage(word or Lineage.RFC_V1)
    except ValueError:
        offered = ", ".join(lineage.value for lineage in Lineage)
        raise BadRequest(
            Reason.ARGUMENT_INVALID, f"lineage {word!r} is not offered; use {offered}"
        ) from None


def mempolicy_from_wire(wire: types_pb2.MemPolicy) -> MemPolicy:
    """Return the policy; an absent one is the default."""
    mode = _POLICY_MODES.get(wire.mode)
    if mode is None:
        raise BadRequest(
            Reason.MEMPOLICY_INVALID, f"memory policy mode {wire.mode} is unknown"
        )
    return MemPolicy(mode, tuple(wire.nodes))


def mempolicy_to_wire(policy: MemPolicy) -> types_pb2.MemPolicy:
    """Return the message of a policy."""
    return types_pb2.MemPolicy(mode=_WIRE_MODES[policy.mode], nodes=policy.nodes)


def mempolicy_run_to_wire(pages: PgRange, policy: MemPolicy) -> pb.MempolicyRun:
    """Return the message of pages that have one policy."""
    return pb.MempolicyRun(
        offset=pages.offset, size=pages.size, mempolicy=mempolicy_to_wire(policy)
    )


def hold_kind_from_wire(kind: pb.HoldKind.ValueType) -> HoldKind:
    """Return the kind of hold; one that was not given is refused."""
    if kind not in _HOLD_KINDS:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            f"kind {kind} is no kind of hold: say HOLD_KIND_PIN or HOLD_KIND_PLAIN",
        )
    return _HOLD_KINDS[kind]


def folio_from_wire(wire: types_pb2.Folio) -> Folio:
    """Return the folio of a message."""
    return Folio(Pfn(wire.pfn), wire.order, NodeId(wire.node))


def folio_to_wire(folio: Folio) -> types_pb2.Folio:
    """Return the message of a folio."""
    return types_pb2.Folio(pfn=folio.pfn, order=folio.order, node=folio.node)


def meant_from_wire(wire: pb.Meant.ValueType) -> Faultability | None:
    """Return the faultability that an access is for; None for either."""
    return _MEANT.get(wire)


def page_to_wire(outcome: GuestFaultOutcome) -> pb.GetPfnResponse:
    """Return what a guest fault came to."""
    match outcome:
        case WrongAccess():
            return pb.GetPfnResponse(wrong_access=True)
        case GuestPage():
            return pb.GetPfnResponse(
                pfn=outcome.pfn,
                order=outcome.order,
                shared=outcome.shared,
                npages=outcome.nr_pages,
            )


def operation_to_wire(status: MergeStatus, names: Names) -> pb.Operation:
    """Return the message of a deferred merge."""
    return pb.Operation(
        name=names.of_operation(status.number),
        done=status.done,
        error=status.error,
        metadata=pb.MergeMetadata(
            guest_memfd=names.of(status.inode),
            inode=status.inode,
            pages_left=status.pages_left,
            folios_left=status.folios_left,
        ),
    )


def inode_to_wire(
    statistics: InodeStatistics, names: Names, fragment_bytes: int
) -> pb.GuestMemfd:
    """Return the message of one inode's snapshot."""
    return pb.GuestMemfd(
        name=names.of(statistics.inode),
        inode=statistics.inode,
        lineage=statistics.lineage.value,
        size=statistics.i_size,
        page_size=statistics.page_size,
        st_blocks=statistics.st_blocks,
        st_blksize=statistics.st_blksize,
        file_open=statistics.file_open,
        host_views_open=statistics.host_views_open,
        guest_views_open=statistics.guest_views_open,
        whole_folios=statistics.whole_folios,
        split_folios=statistics.split_folios,
        shared_pages=statistics.shared_pages,
        private_pages=statistics.private_pages,
        bindings=[_binding_to_wire(binding) for binding in statistics.bindings],
        holds=[_hold_to_wire(hold) for hold in statistics.holds],
        fragments=[_fragment_to_wire(run) for run in statistics.fragments],
        nr_fragments=statistics.nr_fragments,
        fragment_bytes=fragment_bytes,
        cgroup=statistics.cgroup,
        poisoned_pages=statistics.poisoned_pages,
        poisoned_offsets=statistics.poisoned_offsets,
    )


def kill_policy_from_wire(wire: pb.KillPolicy.ValueType) -> KillPolicy:
    """Return the policy; one that does not exist is refused."""
    if wire not in _KILL_POLICIES:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            f"kill_policy {wire} is none: say KILL_POLICY_EARLY, KILL_POLICY_LATE or "
            "nothing",
        )
    return _KILL_POLICIES[wire]


def failure_to_wire(failure: MemoryFailure) -> pb.InjectMemoryErrorResponse:
    """Return the message of what an error has taken."""
    return pb.InjectMemoryErrorResponse(
        pfn=failure.pfn,
        offset=failure.pages.offset,
        size=failure.pages.size,
        errno=failure.errno,
        mapped=failure.mapped,
        signalled=failure.signalled,
        dirty=failure.dirty,
    )


def _binding_to_wire(binding: Binding) -> pb.Binding:
    return pb.Binding(
        vm=binding.vm,
        slot=binding.slot,
        base_gfn=binding.base_gfn,
        offset=binding.pages.offset,
        size=binding.pages.size,
    )


def _hold_to_wire(hold: Hold) -> pb.Hold:
    return pb.Hold(
        hold=hold.hold,
        kind=_WIRE_HOLD_KINDS[hold.kind],
        holder=hold.holder,
        client=hold.client,
        offset=hold.pages.offset,
        size=hold.pages.size,
        ttl_ms=hold.ttl_ms,
    )


def _fragment_to_wire(fragment: Fragment) -> pb.Fragment:
    return pb.Fragment(
        offset=fragment.pages.offset,
        size=fragment.pages.size,
        shared=fragment.faultability is Faultability.ALL,
    )
