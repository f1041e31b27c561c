"""Revocation under clients that write: nobody loses a byte of a page that stays."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from gmem.client import GuestMemfdClient
from gmem.uapi.errors import Contended, NotFaultable, Reason
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.support.hosts import Host, Inode, Program, new_inode, refused

pytestmark = pytest.mark.fuse

PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
UNIT = SIZE_2M // PAGE_SIZE
CONVERSIONS = 200


async def test_a_punch_takes_one_page_from_both_and_no_byte_of_the_others(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    one, two = await inode.mapped_by("one"), await inode.mapped_by("two")
    # Dirty in both: each writes every other page of what both map.
    for page in range(0, 32, 2):
        await one.asked("raw_store", page * PAGE_SIZE, 0x11)
        await two.asked("raw_store", (page + 1) * PAGE_SIZE, 0x22)
        await two.asked("raw_load", page * PAGE_SIZE)
    await inode.fallocate(PUNCH, 8 * PAGE_SIZE, 4 * PAGE_SIZE)
    for client in (one, two):
        for page in range(32):
            value = 0 if 8 <= page < 12 else 0x22 if page % 2 else 0x11
            assert await client.asked("raw_load", page * PAGE_SIZE) == value, page


async def test_a_conversion_takes_pages_from_both_and_keeps_their_dirty_neighbours(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    clients = [await inode.mapped_by("one"), await inode.mapped_by("two")]
    for client in clients:
        await client.asked("write", 0, 0x42, 64 * PAGE_SIZE)
        await client.asked("dont_need")
    # Nobody has them mapped, all are cached and dirty.
    await inode.convert(16 * PAGE_SIZE, 16 * PAGE_SIZE, private=True)
    for client in clients:
        with refused(Reason.PAGE_NOT_FAULTABLE) as caught:
            await client.asked("read", 0, 64 * PAGE_SIZE)
        assert caught[0].numbers["error_offset"] == 16 * PAGE_SIZE
        for first, count in ((0, 16), (32, 32)):
            size = count * PAGE_SIZE
            args = (first * PAGE_SIZE, size, 0x42)
            assert await client.asked("count_other", *args) == 0


async def test_a_touch_during_a_conversion_refuses_it_or_is_refused(
    clean_host: Host, gmem: GuestMemfdClient, report_line: Callable[[str], None]
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    outcomes: Counter[str] = Counter()
    for _ in range(40):
        await client.asked("write", 0, 1)
        await client.asked("dont_need")
        outcomes[await _race(inode, client)] += 1
        await inode.convert(0, PAGE_SIZE, private=False)
    report_line(f"40 touches during a conversion: {dict(sorted(outcomes.items()))}")


async def _race(inode: Inode, client: Program) -> str:
    """Touch and convert at once: either one may win, and there is no third outcome."""
    touch = asyncio.create_task(client.asked("write", 0, 2))
    in_use = await _refusal_of(inode.convert(0, PAGE_SIZE, private=True))
    if in_use is not None:
        assert in_use.numbers["holders"] == f"pid {client.pid} ({client.name})"
        await touch
        assert await client.asked("read", 0) == "02"
        await client.asked("dont_need")
        await inode.convert(0, PAGE_SIZE, private=True)
        return "refused"
    with suppress(NotFaultable):
        await touch
    with refused(Reason.PAGE_NOT_FAULTABLE):
        await client.asked("read", 0)
    return "converted"


async def _refusal_of(converting: Awaitable[None]) -> Contended | None:
    try:
        await converting
    except Contended as error:
        return error
    return None


async def test_random_conversions_under_a_writing_client_lose_no_byte(
    clean_host: Host,
    gmem: GuestMemfdClient,
    report_line: Callable[[str], None],
) -> None:
    inode = await new_inode(clean_host, gmem, pages=2)
    writer = await inode.mapped_by("writer")
    toucher = await inode.mapped_by("toucher")
    stays = [page * PAGE_SIZE for page in range(0, 2 * UNIT, 16)]
    writer.tell("count_up", stays)

    chance = random.Random(2024)
    for _ in range(CONVERSIONS):
        await _convert_something(inode, toucher, chance)
    writer.tell("counters", stays)
    counted = await asyncio.to_thread(writer.heard)
    seen = await asyncio.to_thread(writer.heard)
    assert seen == [counted["rounds"]] * len(stays)
    assert counted["rounds"] > CONVERSIONS
    await asyncio.to_thread(writer.stop)
    # And what the writer leaves behind is what the next one finds.
    assert await toucher.asked("counters", stays) == seen
    report_line(
        f"{CONVERSIONS} conversions under {counted['rounds']} rounds of {len(stays)} "
        f"writes, none lost; longest round {counted['longest_ms']} ms"
    )


async def _convert_something(
    inode: Inode, toucher: Program, chance: random.Random
) -> None:
    """Convert pages between two of the writer's there and back; check their bytes."""
    start = chance.randrange(0, 2 * UNIT, 16) + chance.randrange(1, 8)
    first, size = start * PAGE_SIZE, chance.randrange(1, 9) * PAGE_SIZE
    value = chance.randrange(1, 256)
    await toucher.asked("write", first, value, size)
    await toucher.asked("dont_need")
    await inode.convert(first, size, private=True)
    with refused(Reason.PAGE_NOT_FAULTABLE):
        await toucher.asked("write", first, value)
    await inode.convert(first, size, private=False)
    assert await toucher.asked("count_other", first, size, 0) == 0
    await toucher.asked("dont_need")


async def test_a_conversion_unmaps_exactly_its_range(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by("one")
    await client.asked("raw_store", PAGE_SIZE, 0x11)
    # The first page is of the same folio, and nobody has it mapped.
    await inode.convert(0, PAGE_SIZE, private=True)
    with refused(Reason.PAGE_IN_USE) as caught:
        await inode.convert(PAGE_SIZE, PAGE_SIZE, private=True)
    assert caught[0].numbers["error_offset"] == PAGE_SIZE
