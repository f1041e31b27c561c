"""``python -m tests.bench.worker CONTROL_FD``: the process that touches views.

No loop and no gRPC: it maps files under names, does what the messages on CONTROL_FD
say (fdpass), and answers with seconds. Times are taken here, around the act alone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gmem.runtime import fdpass
from gmem.runtime.broker_client import BrokerClient
from gmem.uapi.flags import (
    KVM_GMEM_CONVERT_FORMAT,
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
)
from gmem.uapi.pages import PAGE_SIZE
from tests.bench.bare_fuse import SIZE as BARE_SIZE


class File:
    """An open file, mapped shared as a whole."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self.map = mmap.mmap(fd, size, mmap.MAP_SHARED)

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self.map, np.uint8)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


class Worker:
    """One method per message."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.broker: BrokerClient
        self.chosen: list[int] = []
        self.copy: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None = None

    # Files.

    def hello(self, broker: str) -> None:
        self.broker = BrokerClient(Path(broker), "bench", "1")

    def goodbye(self) -> None:
        self.broker.close()

    def take(self, name: str, token: str, size: int) -> None:
        self.files[name] = File(self.broker.take(token), size)

    def memfd(self, name: str, size: int) -> None:
        fd = os.memfd_create(name)
        os.ftruncate(fd, size)
        self.files[name] = File(fd, size)

    def open_bare(self, name: str, mount_fd: int) -> None:
        fd = os.open("bare", os.O_RDWR | os.O_CLOEXEC, dir_fd=mount_fd)
        os.close(mount_fd)
        self.files[name] = File(fd, BARE_SIZE)

    def close(self, name: str) -> None:
        self.files.pop(name).close()

    # Memory.

    def fill(self, name: str, value: int) -> float:
        """Write every byte; seconds."""
        array = self.files[name].array
        return seconds(lambda: array.fill(value))

    def copy_bytes(self, size: int) -> float:
        """Copy between two arrays that are resident; seconds."""
        if self.copy is None:
            self.copy = np.ones(size, np.uint8), np.ones(size, np.uint8)
        source, target = self.copy
        return seconds(lambda: np.copyto(target, source))

    def drop_copy(self) -> None:
        self.copy = None

    def touch(self, name: str, pages: list[int]) -> None:
        """Read a byte of each page of `range(*pages)`, without readahead."""
        file = self.files[name]
        file.map.madvise(mmap.MADV_RANDOM)
        for page in range(*pages):
            file.map[page * PAGE_SIZE]

    def faults(self, name: str, pages: list[int]) -> float:
        """The median of the first touches of pages; seconds."""
        file = self.files[name]
        file.map.madvise(mmap.MADV_RANDOM)
        memory, clock = file.map, time.perf_counter
        found = []
        for page in range(*pages):
            began = clock()
            memory[page * PAGE_SIZE]
            found.append(clock() - began)
        return statistics.median(found)

    # ioctls.

    def ioctls(self, name: str, count: int) -> float:
        """The median of `count` ioctls with a struct of the same size; seconds."""
        argument = struct.pack(KVM_GMEM_CONVERT_FORMAT, 0, PAGE_SIZE, 0)
        fd = self.files[name].fd
        number = KVM_GMEM_CONVERT_SHARED
        return statistics.median(
            seconds(lambda: fcntl.ioctl(fd, number, argument)) for _ in range(count)
        )

    def convert(self, name: str, offset: int, size: int, private: bool) -> float:
        """KVM_GMEM_CONVERT_PRIVATE or _SHARED of one range; seconds."""
        number = KVM_GMEM_CONVERT_PRIVATE if private else KVM_GMEM_CONVERT_SHARED
        argument = struct.pack(KVM_GMEM_CONVERT_FORMAT, offset, size, 0)
        fd = self.files[name].fd
        return seconds(lambda: fcntl.ioctl(fd, number, argument))

    def convert_pages(self, name: str, pages: list[int]) -> float:
        """Read each page, then make it private; the median of the ioctls, seconds.

        All are shared again afterwards.
        """
        median = self._convert_clean(name, range(*pages))
        for page in range(*pages):
            self.convert(name, page * PAGE_SIZE, PAGE_SIZE, private=False)
        return median

    def convert_random(self, name: str, count: int, of: int, skip: int) -> float:
        """Make random pages private: `count` of a choice of `of`, from `skip` on.

        Each is resident and clean, none comes twice; the median, seconds.
        """
        if skip == 0:
            nr_pages = self.files[name].size // PAGE_SIZE
            self.chosen = random.Random(1).sample(range(nr_pages), of)
        return self._convert_clean(name, self.chosen[skip : skip + count])

    def _convert_clean(self, name: str, pages: Iterable[int]) -> float:
        file = self.files[name]
        file.map.madvise(mmap.MADV_RANDOM)
        found = []
        for page in pages:
            file.map[page * PAGE_SIZE]
            offset = page * PAGE_SIZE
            found.append(self.convert(name, offset, PAGE_SIZE, private=True))
        return statistics.median(found)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    worker = Worker()
    while (message := fdpass.receive(control)) is not None:
        args: list[Any] = [*message.fields["args"], *message.fds]
        try:
            fdpass.send(control, {"ok": getattr(worker, message.fields["op"])(*args)})
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            fdpass.send(control, {"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
