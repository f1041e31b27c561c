"""How each row is measured: ours and reference as two callables, taken in turn.

A row gets a Scene (a host with a worker) and yields the pair; what it set up goes when
the pair is no longer needed. `notes` of the scene become conditions of the result.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Final

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.bench.children import Echo, bare_fuse, bare_grpc
from tests.bench.measuring import Measure, median_call, rate
from tests.bench.scene import GPA, Memory, Scene
from tests.support.hosts import VM

Pair = tuple[Measure, Measure]
Row = Callable[[Scene], AbstractAsyncContextManager[Pair]]

MICRO: Final = 1e6
FAULTS: Final = 2000
CONVERSIONS: Final = 500
CALLS: Final = 300
IN_A_BATCH: Final = 1000
FOLIOS: Final = 256


@asynccontextmanager
async def rewrite(scene: Scene) -> AsyncIterator[Pair]:
    """(a): every page is resident and was written before."""
    async with _shared_inode(scene) as view:
        await scene.worker("memfd", "plain", SIZE_1G)
        try:
            for name in (view, "plain"):
                await scene.worker("fill", name, 1)
            yield partial(_fill, scene, view), partial(_fill, scene, "plain")
        finally:
            await scene.worker("close", "plain")


@asynccontextmanager
async def first_fill(scene: Scene) -> AsyncIterator[Pair]:
    """(b): a new inode, and a new memfd, for each round."""

    async def ours() -> float:
        async with _shared_inode(scene) as view:
            return await _fill(scene, view)

    async def reference() -> float:
        await scene.worker("memfd", "plain", SIZE_1G)
        try:
            return await _fill(scene, "plain")
        finally:
            await scene.worker("close", "plain")

    yield ours, reference


@asynccontextmanager
async def single_fault(scene: Scene) -> AsyncIterator[Pair]:
    """(c): pages that nobody has touched, of a folio that is there."""
    async with _shared_inode(scene) as view, bare_fuse(scene.worker) as bare:
        await scene.worker("touch", view, [0, 1])
        first = {view: 1, bare: 1}

        async def fault(name: str) -> float:
            scene.begin_round()
            pages = [first[name], first[name] + FAULTS]
            first[name] += FAULTS
            median: float = await scene.worker("faults", name, pages)
            return median * MICRO

        yield partial(fault, view), partial(fault, bare)


@asynccontextmanager
async def one_page(scene: Scene) -> AsyncIterator[Pair]:
    """(d): each page is read first; the VM was handed nothing."""
    async with scene.memory() as memory, bare_fuse(scene.worker) as bare:

        async def ours() -> float:
            scene.begin_round()
            pages = [1, 1 + CONVERSIONS]
            median = await scene.worker("convert_pages", memory.inode, pages)
            return float(median) * MICRO

        yield ours, partial(_ioctls, scene, bare)


@asynccontextmanager
async def one_page_acknowledged(scene: Scene) -> AsyncIterator[Pair]:
    """(e): the VM was handed the page just before; it hears begin and end."""
    async with scene.memory() as memory, bare_grpc() as echo:

        async def ours() -> float:
            scene.begin_round()
            found = []
            for page in range(1, 1 + CALLS):
                await scene.worker("touch", memory.inode, [page, page + 1])
                await _hand_out(scene, memory, page)
                found.append(await _convert(scene, memory, page, private=True))
            for page in range(1, 1 + CALLS):
                await _convert(scene, memory, page, private=False)
            return sorted(found)[len(found) // 2] * MICRO

        yield ours, partial(_echo_micros, echo)


@asynccontextmanager
async def first_in_a_huge_page(scene: Scene) -> AsyncIterator[Pair]:
    """(f): back to private makes the 1G page whole again, for the next one."""
    async with scene.memory(shared=False) as memory, bare_grpc() as echo:
        await scene.gmem.fallocate(
            name=memory.inode, mode=FALLOC_FL_KEEP_SIZE, offset=0, length=SIZE_1G
        )

        async def ours() -> float:
            scene.begin_round()
            found = []
            for page in range(CALLS):
                found.append(await _convert(scene, memory, page, private=False))
                await _convert(scene, memory, page, private=True)
            return sorted(found)[len(found) // 2] * MICRO

        yield ours, partial(_echo_micros, echo)


@asynccontextmanager
async def many_calls(scene: Scene) -> AsyncIterator[Pair]:
    """(g): one page for each call, all of them clean."""
    async with scene.memory() as memory, bare_grpc() as echo:
        yield partial(_rate_of_calls, scene, memory), partial(_echo_rate, echo)


@asynccontextmanager
async def many_calls_acknowledged(scene: Scene) -> AsyncIterator[Pair]:
    """(g-ack): a page in each of many 2M pages, each handed out before."""
    size = FOLIOS * SIZE_2M
    async with (
        scene.memory(size=size, page_size=SIZE_2M) as memory,
        bare_grpc() as echo,
    ):
        step = SIZE_2M >> PAGE_SHIFT
        pages = range(0, size >> PAGE_SHIFT, step)

        async def ours() -> float:
            scene.begin_round()
            await scene.worker("touch", memory.inode, [0, pages.stop, step])
            await rate([partial(_hand_out, scene, memory, page) for page in pages])
            calls = [partial(_call, scene, memory, [page], True) for page in pages]
            reached = await rate(calls)
            await _call(scene, memory, list(pages), False)
            return reached

        yield ours, partial(_echo_rate, echo)


@asynccontextmanager
async def untouched(scene: Scene) -> AsyncIterator[Pair]:
    """(h): no page has a folio; there and back, the median of both."""
    async with scene.memory() as memory, bare_fuse(scene.worker) as bare:

        async def ours() -> float:
            scene.begin_round()
            found = []
            for number in range(CALLS):
                private = not number % 2
                found.append(await _convert_all(scene, memory, private=private))
            return sorted(found)[len(found) // 2] * MICRO

        yield ours, partial(_ioctls, scene, bare)


@asynccontextmanager
async def dirty_gigabyte(scene: Scene) -> AsyncIterator[Pair]:
    """(i): filled through the view just before; its 4K pages are all shared."""
    async with scene.memory() as memory:

        async def ours() -> float:
            scene.begin_round()
            await scene.worker("fill", memory.inode, 7)
            scene.begin_round()
            taken = await _convert_all(scene, memory, private=True)
            await _convert_all(scene, memory, private=False)
            return taken

        async def reference() -> float:
            return float(await scene.worker("copy_bytes", SIZE_1G))

        await reference()
        try:
            yield ours, reference
        finally:
            await scene.worker("drop_copy")


@asynccontextmanager
async def one_batch(scene: Scene) -> AsyncIterator[Pair]:
    """(j): every other page, so that none can be merged with its neighbour."""
    async with scene.memory() as memory:
        pages = list(range(0, 2 * IN_A_BATCH, 2))

        async def ours() -> float:
            scene.begin_round()
            await scene.worker("touch", memory.inode, [0, 2 * IN_A_BATCH, 2])
            seconds = await median_call(
                partial(_call, scene, memory, pages, True), count=1
            )
            await _call(scene, memory, pages, False)
            return IN_A_BATCH / seconds

        yield ours, partial(_rate_of_calls, scene, memory)


ROWS: Final[dict[str, Row]] = {
    "a": rewrite,
    "b": first_fill,
    "c": single_fault,
    "d": one_page,
    "e": one_page_acknowledged,
    "f": first_in_a_huge_page,
    "g": many_calls,
    "g-ack": many_calls_acknowledged,
    "h": untouched,
    "i": dirty_gigabyte,
    "j": one_batch,
}
"""The rows that are measured on one small host; `whole_hosts` has the others."""


@asynccontextmanager
async def _shared_inode(scene: Scene) -> AsyncIterator[str]:
    """Make an inode of RFC_V1 that the host may fault, mapped by the worker."""
    gmem = scene.gmem
    made = await gmem.create_guest_memfd(size=SIZE_1G, page_size=SIZE_1G, vm=VM)
    try:
        await gmem.bind_memslot(
            name=made.name,
            vm=VM,
            slot=0,
            base_gfn=GPA >> PAGE_SHIFT,
            offset=0,
            size=SIZE_1G,
            host_faultable=True,
        )
        await scene.map(made.name, SIZE_1G)
        try:
            yield made.name
        finally:
            await scene.worker("close", made.name)
    finally:
        await gmem.delete_guest_memfd(name=made.name)


async def _fill(scene: Scene, name: str) -> float:
    """Return GiB/s."""
    scene.begin_round()
    return 1 / float(await scene.worker("fill", name, 5))


async def _ioctls(scene: Scene, bare: str) -> float:
    return float(await scene.worker("ioctls", bare, CONVERSIONS)) * MICRO


async def _echo_micros(echo: Echo) -> float:
    return await median_call(echo, CALLS) * MICRO


async def _echo_rate(echo: Echo) -> float:
    return await rate([echo] * 2 * IN_A_BATCH)


async def _convert(scene: Scene, memory: Memory, page: int, *, private: bool) -> float:
    offset = page << PAGE_SHIFT
    arguments = memory.inode, offset, PAGE_SIZE, private
    return float(await scene.worker("convert", *arguments))


async def _convert_all(scene: Scene, memory: Memory, *, private: bool) -> float:
    taken = await scene.worker("convert", memory.inode, 0, memory.size, private)
    return float(taken)


async def _hand_out(scene: Scene, memory: Memory, page: int) -> None:
    gfn = (GPA >> PAGE_SHIFT) + page
    got = await scene.gmem.get_pfn(name=memory.inode, vm=memory.vm, slot=0, gfn=gfn)
    assert got.shared, got


async def _call(scene: Scene, memory: Memory, pages: list[int], private: bool) -> None:
    ranges = [
        pb.Range(name=memory.inode, offset=page << PAGE_SHIFT, size=PAGE_SIZE)
        for page in pages
    ]
    await scene.gmem.convert_range(ranges=ranges, to_shared=not private, timeout=60)


async def _rate_of_calls(scene: Scene, memory: Memory) -> float:
    """Return the conversions of one second, one page each."""
    scene.begin_round()
    pages = list(range(0, 2 * IN_A_BATCH, 2))
    await scene.worker("touch", memory.inode, [0, 2 * IN_A_BATCH, 2])
    calls = [partial(_call, scene, memory, [page], True) for page in pages]
    reached = await rate(calls)
    await _call(scene, memory, pages, False)
    return reached
