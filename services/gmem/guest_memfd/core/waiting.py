"""Waiting for the holders of pages instead of refusing: the series' own wish.

A cover letter of the 39 patches wants a conversion that "waits for safe_refcount"; no
series has it. Here an attempt that meets pages in use rolls nothing back; its locks are
released, it waits until a hold on the inode ends, and begins again with every check.
Nobody tells when a process unmaps a page, so that for mappings it looks again at an
interval. Time passes in the world: the core names an amount, and is given an instant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gmem.effects import Op, perform
from gmem.guest_memfd.core.effects import StartWait, Waited, WaitForRelease
from gmem.guest_memfd.core.references import References
from gmem.uapi.errors import Contended, Reason
from gmem.uapi.waits import require_wait


def until_released(
    attempt: Callable[[], Op[None]],
    references: Callable[[], Mapping[int, References]],
    wait_ms: int,
) -> Op[None]:
    """Run `attempt` until its pages are free, for `wait_ms` milliseconds at most.

    `references` returns those of the inodes it needs, by number. Raises BadRequest
    (ARGUMENT_INVALID), Contended (DEADLINE) with the offset and the holders,
    Contended (INTERRUPTED) where the service stops, and what `attempt` does.
    """
    require_wait(wait_ms)
    instant = yield from perform(StartWait(wait_ms))
    while True:
        # Counted before the attempt: a hold that ends during it is not missed.
        held = references()
        counts = {number: held[number].ended for number in held}
        try:
            return (yield from attempt())
        except Contended as error:
            if error.reason is not Reason.PAGE_IN_USE:
                raise
            refusal = error
        number = _inode_of(refusal, held)
        waited = yield from perform(
            WaitForRelease(
                inode=number,
                references=held[number],
                ended=counts[number],
                mapped=bool(refusal.numbers.get("mapped", 1)),
                instant=instant,
            )
        )
        if waited is not Waited.AGAIN:
            raise _given_up(refusal, waited, wait_ms) from refusal


def _inode_of(refusal: Contended, held: Mapping[int, References]) -> int:
    number = refusal.numbers.get("inode")
    return number if isinstance(number, int) and number in held else next(iter(held))


def _given_up(refusal: Contended, waited: Waited, wait_ms: int) -> Contended:
    reason = Reason.DEADLINE
    words = f"after {wait_ms} ms"
    if waited is Waited.STOPPING:
        reason, words = Reason.INTERRUPTED, "the service stops, and"
    return Contended(
        reason,
        f"{words} {refusal.sentence}",
        lineage=refusal.lineage,
        **refusal.numbers,
    )
