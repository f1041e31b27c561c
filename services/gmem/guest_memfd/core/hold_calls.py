"""The calls about holds: taking, keeping alive and ending them, and their leases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from gmem.effects import Op, perform
from gmem.guest_memfd.core import operations
from gmem.guest_memfd.core.effects import ScheduleMerge
from gmem.guest_memfd.core.inodes import ByteRange, Inodes
from gmem.guest_memfd.core.leases import Leases, require_ttl
from gmem.guest_memfd.core.lineage import LineageRules, Operation
from gmem.guest_memfd.core.operations import guarded
from gmem.guest_memfd.core.references import no_such_hold
from gmem.guest_memfd.core.values import Hold, HoldKind
from gmem.uapi.errors import NoSuchObject
from gmem.uapi.lineage import Lineage


class HoldCalls(Inodes):
    """What can be called about holds on pages; part of `GuestMemfdCore`."""

    def __init__(self, rules: Mapping[Lineage, LineageRules]) -> None:
        super().__init__(rules)
        self._leases = Leases()

    def pin(
        self,
        target: ByteRange,
        kind: HoldKind,
        *,
        holder: str,
        client: str,
        ttl_ms: int = 0,
    ) -> Op[int]:
        """Take a named hold on shared pages; return its number.

        With `ttl_ms` it is a lease: it ends by itself when it is not kept alive.
        """
        require_ttl(ttl_ms)
        inode, pages = self._pages_of(target)
        number = self._next_hold
        hold = Hold(number, kind, holder, client, inode.number, pages, ttl_ms)
        self._next_hold += 1
        body = operations.pin(inode, hold)
        yield from self._using([inode], guarded(inode, Operation.PIN, body))
        yield from self._leases.begin(hold)
        return hold.hold

    def keep_alive(self, holds: Sequence[int]) -> Op[None]:
        """Let the leases of holds begin anew; NoSuchObject (HOLDER_UNKNOWN)."""
        for hold in holds:
            live = any(hold in inode.references for inode in self._inodes.values())
            if not live and hold not in self.deferred:
                raise no_such_hold(hold)
        yield from self._leases.renew(holds)

    def lease_expired(self, hold: int, renewals: int) -> Op[bool]:
        """End a hold whose lease ran out, unless it was renewed; tell whether."""
        has_run_out = self._leases.has_run_out(hold, renewals)
        if has_run_out:
            yield from self.unpin(hold)
        return has_run_out

    def resume_leases(self) -> Op[None]:
        """Let every lease begin anew, after a restart of the service."""
        for inode in list(self._inodes.values()):
            for hold in inode.references.holds:
                yield from self._leases.begin(hold)

    def unpin(self, hold: int) -> Op[None]:
        """End a hold; NoSuchObject (HOLDER_UNKNOWN)."""
        yield from self._leases.end(hold)
        for inode in self._inodes.values():
            if hold in inode.references:
                return (yield from self._using([inode], operations.unpin(inode, hold)))
        if hold in self.deferred:
            for number in self.deferred.put(hold):
                yield from perform(ScheduleMerge(number))
            return None
        raise no_such_hold(hold)

    def client_gone(self, client: str) -> Op[None]:
        """End every hold of a client, as a process's exit does."""
        holds = [
            hold
            for inode in self._inodes.values()
            for hold in inode.references.of_client(client)
        ]
        holds += self.deferred.of_client(client)
        for hold in holds:
            # Its owner may be ending it at this moment.
            with suppress(NoSuchObject):
                yield from self.unpin(hold)
