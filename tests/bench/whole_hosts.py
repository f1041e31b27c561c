"""The rows for which hosts are started: (k) the start itself, (l) a host of 1 TiB."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from contextlib import AsyncExitStack, ExitStack
from typing import Final

from gmem.runtime.config import HostShape, NodeShape
from gmem.uapi.pages import PAGE_SHIFT, SIZE_1G, format_size
from tests.bench.children import worker_process
from tests.bench.measuring import Result, Target, alternate, result_of
from tests.bench.rows import MICRO
from tests.bench.scene import LARGE, TMPFS, VMMS, Memory, Scene, scene_of
from tests.support.gmemctl import Gmemctl, gmemctl
from tests.support.hosts import running_host

TINY: Final = HostShape(
    nodes=(NodeShape(memory_size=2 * SIZE_1G, huge_pages={SIZE_1G: 1}),)
)
LARGE_INODE: Final = 1024 * SIZE_1G
IN_ALL: Final = 100_000
# What the watchdog gets to see as one round.
TOUCHED_AT_ONCE: Final = 64
CONVERTED_AT_ONCE: Final = 1_000
IMPORTS: Final = "import grpc, grpc.aio, numpy"


def start_of_a_host(target: Target, rounds: int) -> Result:
    """(k): from the command to its end, when every service has answered."""
    with gmemctl() as ctl:

        async def ours() -> float:
            began = time.perf_counter()
            ended = await asyncio.to_thread(ctl, "up", "--host", "b")
            taken = time.perf_counter() - began
            assert ended.status == 0, ended.err
            _down(ctl)
            return taken

        async def reference() -> float:
            began = time.perf_counter()
            command = [sys.executable, "-c", IMPORTS]
            await asyncio.to_thread(subprocess.run, command, check=True)
            return time.perf_counter() - began

        pairs = asyncio.run(alternate(ours, reference, rounds))
        return result_of(target, pairs, ["four services, two of them wait for others"])


def _down(ctl: Gmemctl) -> None:
    ended = ctl("down", "--host", "b")
    assert ended.status == 0, ended.err


def large_host(target: Target, rounds: int) -> Result:
    """(l): the same choice of pages by chance in 1 TiB and in 1 GiB."""
    with ExitStack() as stack:
        enter = stack.enter_context
        hosts = [
            enter(running_host(shape, VMMS, under=TMPFS, spare=False))
            for shape in (LARGE, TINY)
        ]
        workers = [enter(worker_process()) for _ in hosts]

        async def measured() -> Result:
            async with AsyncExitStack() as scenes:
                sides: list[_Side] = []
                begun: list[Scene] = []
                for host, worker, size in zip(
                    hosts, workers, (LARGE_INODE, SIZE_1G), strict=True
                ):
                    scene = await scenes.enter_async_context(scene_of(host, worker))
                    memory = await scenes.enter_async_context(scene.memory(size=size))
                    begun.append(scene)
                    sides.append(await _Side.ready(scene, memory, rounds, begun))
                large, small = sides
                pairs = await alternate(large.convert, small.convert, rounds)
                return result_of(target, pairs, [await s.metadata() for s in sides])

        return asyncio.run(measured())


class _Side:
    """One inode, and how many of its chosen pages were converted.

    The watchdogs of all hosts in `begun` wait while one side is at work: on a busy
    machine that is longer than their bound.
    """

    def __init__(
        self, scene: Scene, memory: Memory, rounds: int, begun: list[Scene]
    ) -> None:
        self._scene, self._memory, self._begun = scene, memory, begun
        self._each = IN_ALL // rounds
        self._done = 0

    @classmethod
    async def ready(
        cls, scene: Scene, memory: Memory, rounds: int, begun: list[Scene]
    ) -> _Side:
        """Have a folio in each huge page, split by its first touch."""
        side = cls(scene, memory, rounds, begun)
        step = SIZE_1G >> PAGE_SHIFT
        for first in range(0, memory.size >> PAGE_SHIFT, TOUCHED_AT_ONCE * step):
            side.begin_round()
            last = min(first + TOUCHED_AT_ONCE * step, memory.size >> PAGE_SHIFT)
            await scene.worker("touch", memory.inode, [first, last, step])
        return side

    def begin_round(self) -> None:
        """Give every watchdog its whole bound again."""
        for scene in self._begun:
            scene.begin_round()

    async def convert(self) -> float:
        """Convert the next share of the pages; the median of medians."""
        medians = []
        for _ in range(self._each // CONVERTED_AT_ONCE):
            self.begin_round()
            which = CONVERTED_AT_ONCE, IN_ALL, self._done
            worker = self._scene.worker
            medians.append(await worker("convert_random", self._memory.inode, *which))
            self._done += CONVERTED_AT_ONCE
        return float(statistics.median(medians)) * MICRO

    async def metadata(self) -> str:
        """Say how many bytes each fragment costs."""
        inode = await self._scene.gmem.get_guest_memfd(self._memory.inode)
        return (
            f"{format_size(self._memory.size)}: {inode.nr_fragments} fragments of "
            f"{inode.fragment_bytes} bytes of metadata"
        )
