"""``python -m tests.support.view_server RUN_DIR CONTROL_FD``: a service of views only.

Takes the descriptors from the keeper of RUN_DIR, serves a ViewSession, and obeys
messages on CONTROL_FD (fdpass): the part of the guest_memfd service around its
session, reduced to what a test of the session wants to decide itself.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gmem.guest_memfd import recovery
from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.page_states import InodeTable
from gmem.guest_memfd.page_store import PageStore
from gmem.guest_memfd.view import handover
from gmem.guest_memfd.view.session import ViewSession
from gmem.runtime import fdpass
from gmem.uapi.errors import KernelError

PUNCH = 3


class Core:
    """A core in small: gives out frames in order, punches by quiescing.

    `fault_policy` is attach, refuse or never; `punch_seconds` is how long a punch
    keeps the range quiesced before it opens again.
    """

    def __init__(self) -> None:
        self.session: ViewSession
        self.store: PageStore
        self.tables: dict[int, InodeTable] = {}
        self.fault_policy = "attach"
        self.ioctl_errno = errno.ENOTTY
        self.faults: list[int] = []
        self.counts: dict[str, int] = {}
        self.next_pfn = 0
        self.lock = threading.Lock()

    def attach(self, ino: int, pgoff: int) -> None:
        table = self.tables[ino]
        index = pgoff >> table.order << table.order
        with self.lock:
            if table.pfn_of(index) is None:
                table.attach(index, self.next_pfn)
                self.next_pfn += 1 << table.order

    def take_over(self, table: InodeTable) -> None:
        self.tables[table.ino] = table
        self.next_pfn = max(self.next_pfn, int(table.frame.max()) + 512)

    def host_fault(self, ino: int, pgoff: int, done: Callable[[bool], None]) -> None:
        self.faults.append(pgoff)
        if self.fault_policy == "attach":
            self.attach(ino, pgoff)
        if self.fault_policy != "never":
            done(self.fault_policy == "attach")

    def fallocate(
        self,
        ino: int,
        mode: int,
        offset: int,
        length: int,
        done: Callable[[int], None],
    ) -> None:
        if self.fault_policy == "never":
            return
        if mode != PUNCH:
            done(errno.EOPNOTSUPP)
            return

        def work() -> None:
            self.punch(ino, offset >> 12, (offset + length) >> 12)
            done(0)

        threading.Thread(target=work).start()

    def punch(self, ino: int, start: int, stop: int) -> None:
        """Free whole units, zero the rest, while nobody has a page of them."""
        table = self.tables[ino]
        quiesced = [
            (view, run)
            for view in ViewKind
            for run in self.session.quiesce(ino, view, start, stop)
        ]
        size = 1 << table.order
        for first, last in table.attached_in(start, stop):
            for index in range(first, last):
                if index % size == 0 and index + size <= stop:
                    self.store.punch(table.detach(index), size)
            table.clear_uptodate(first, last)
        for view, run in quiesced:
            self.session.set_state(ino, view, *run, PageState.OPEN)

    def ioctl(
        self, ino: int, cmd: int, data: bytes, done: Callable[[int, bytes], None]
    ) -> None:
        """Give the struct back with every byte one higher, and `ioctl_errno`."""
        done(self.ioctl_errno, bytes(byte + 1 & 0xFF for byte in data))

    def opened(self, ino: int, view: ViewKind, fh_count: int) -> None:
        self.counts[f"{ino}.{view.name}"] = fh_count

    released = opened


class Control:
    """One method per message; what it returns is the answer."""

    def __init__(self, core: Core, run_dir: Path, options: dict[str, Any]) -> None:
        self.core = core
        self.handed = handover.connect(run_dir)
        core.store = PageStore.from_fd(self.handed.store_fd, self.handed.nr_pages)
        self.session = core.session = ViewSession(
            self.handed.fuse_fd, self.handed.mount_fd, core.store, core, **options
        )
        misplaced = []
        for table in self.handed.tables.values():
            misplaced += recovery.settle(table, None)
            core.take_over(table)
            self.session.add_inode(table)
        if self.handed.successor:
            self.handed.take_over()
        self.session.start(resend=self.handed.successor)
        recovery.finish(misplaced, self.session.invalidate, self.session.set_state)
        self.handed.serving()

    def add(self, ino: int, size: int, page_size: int, state: int = 2) -> None:
        table = InodeTable.create(ino, size, page_size)
        table.set_host(0, table.nr_pages, PageState(state))
        self.core.tables[ino] = table
        self.handed.hold(table)
        self.session.add_inode(table)

    def remove(self, ino: int) -> None:
        self.session.remove_inode(ino)

    def policy(self, name: str) -> None:
        self.core.fault_policy = name

    def faults(self) -> list[int]:
        return sorted(self.core.faults)

    def attach(self, ino: int, pgoff: int) -> None:
        self.core.attach(ino, pgoff)

    def state(self, ino: int, view: int, start: int, stop: int, state: int) -> None:
        self.session.set_state(ino, ViewKind(view), start, stop, PageState(state))

    def invalidate(self, ino: int, view: int, start: int, stop: int) -> None:
        self.session.invalidate(ino, ViewKind(view), start, stop)

    def invalidate_all(self, ino: int, ranges: list[list[int]]) -> None:
        """Invalidate ranges of the host view, each in a thread of its own."""
        threads = [
            threading.Thread(
                target=self.session.invalidate, args=(ino, ViewKind.HOST, *bounds)
            )
            for bounds in ranges
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def quiesce(self, ino: int, start: int, stop: int) -> list[tuple[int, int]]:
        return self.session.quiesce(ino, ViewKind.HOST, start, stop)

    def punch(self, ino: int, start: int, stop: int) -> None:
        self.core.punch(ino, start, stop)

    def put(self, ino: int, pgoff: int, text: str) -> None:
        """Write the store behind a page, as the guest's side would."""
        table = self.core.tables[ino]
        pfn = table.pfn_of(pgoff)
        assert pfn is not None
        self.core.store.window(pfn, 1)[: len(text)] = text.encode()
        table.set_uptodate(pgoff, pgoff + 1)

    def get(self, ino: int, pgoff: int, count: int) -> str:
        """Read the store behind a page."""
        pfn = self.core.tables[ino].pfn_of(pgoff)
        assert pfn is not None
        return bytes(self.core.store.window(pfn, 1)[:count]).decode()

    def counts(self) -> dict[str, int]:
        return self.core.counts

    def statistics(self) -> dict[str, int]:
        return dataclasses.asdict(self.session.statistics())

    def threads(self) -> list[str]:
        return sorted(thread.name for thread in threading.enumerate())

    def try_guest_by_every_name(self, ino: int) -> list[str]:
        """Open a guest view through the mount without `open_view`; the errors."""
        refusals = []
        for name in (f"inode-{ino}.guest", f"{ino << 1 | 1}", "0" * 64):
            try:
                os.close(os.open(name, os.O_RDWR, dir_fd=self.handed.mount_fd))
            except OSError as error:
                refusals.append(errno.errorcode[error.errno or 0])
        return refusals

    def stop(self) -> None:
        self.session.stop()
        self.handed.stopping()


def main() -> None:
    run_dir, control_fd = Path(sys.argv[1]), int(sys.argv[2])
    control = socket.socket(fileno=control_fd)
    first = fdpass.receive(control)
    assert first is not None
    service = Control(Core(), run_dir, first.fields)
    fdpass.send(control, {"ok": service.handed.connection_id})
    while (message := fdpass.receive(control)) is not None:
        op = message.fields.pop("op")
        if op == "open_view":
            view = ViewKind(message.fields["view"])
            fd = service.session.open_view(message.fields["ino"], view)
            fdpass.send(control, {"ok": None}, [fd])
            os.close(fd)
            continue
        try:
            fdpass.send(control, {"ok": getattr(service, op)(**message.fields)})
        except KernelError as error:
            fdpass.send(control, {"error": str(error)})


if __name__ == "__main__":
    main()
