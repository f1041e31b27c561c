"""Holds that end by themselves: a lease runs out when nobody keeps it alive.

A hold ends with the broker connection of its client; a client that hangs, or that has
no connection, keeps it for ever. A lease bounds that. The world has the clock: it is
told when a lease begins anew, and calls back when it has run out. A renewal that comes
between the two wins, because it counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gmem.effects import Op, perform
from gmem.guest_memfd.core.effects import ArmLease, DisarmLease
from gmem.guest_memfd.core.values import Hold
from gmem.uapi.errors import BadRequest, Reason

TTL_MS_MIN: Final = 500
TTL_MS_MAX: Final = 3_600_000


@dataclass(slots=True)
class _Lease:
    hold: Hold
    renewals: int = 0


class Leases:
    """The leases of one core, by the number of their hold."""

    def __init__(self) -> None:
        self._leases: dict[int, _Lease] = {}

    def begin(self, hold: Hold) -> Op[None]:
        """Let the lease of a hold begin, if it has one."""
        if hold.ttl_ms:
            self._leases[hold.hold] = _Lease(hold)
            yield from self._arm([hold.hold])

    def renew(self, holds: Iterable[int]) -> Op[None]:
        """Let leases begin anew; holds without one are passed over."""
        there = [hold for hold in holds if hold in self._leases]
        for hold in there:
            self._leases[hold].renewals += 1
        yield from self._arm(there)

    def end(self, hold: int) -> Op[None]:
        """Forget the lease of a hold that ends."""
        if self._leases.pop(hold, None) is not None:
            yield from perform(DisarmLease(hold))

    def has_run_out(self, hold: int, renewals: int) -> bool:
        """Tell whether a lease is there and was not renewed since `renewals`."""
        lease = self._leases.get(hold)
        return lease is not None and lease.renewals == renewals

    def _arm(self, holds: Iterable[int]) -> Op[None]:
        leases = [self._leases[hold] for hold in holds]
        for lease in leases:
            hold = lease.hold
            yield from perform(
                ArmLease(hold.hold, hold.client, hold.ttl_ms, lease.renewals)
            )


def require_ttl(ttl_ms: int) -> None:
    """Refuse a lease that is too short or too long: ARGUMENT_INVALID; 0 is none."""
    if ttl_ms and not TTL_MS_MIN <= ttl_ms <= TTL_MS_MAX:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            f"a lease of {ttl_ms} ms cannot be: give {TTL_MS_MIN} to {TTL_MS_MAX}, or "
            "none",
            ttl_ms=ttl_ms,
        )
