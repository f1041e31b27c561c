"""``python -m gmem.vmm.guest``: started by the vmm, one for each VM; nobody else.

It has no event loop and no gRPC, it cannot be inspected by its user (a confidential
guest has no debugger), and it dies with the vmm.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from gmem.runtime.broker_client import BrokerClient
from gmem.vmm.guest.process import GuestProcess

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
EXIT_BUG: Final = 70


class BrokerViews:
    """Takes guest views from brokers and keeps each connection: it is our liveness."""

    def __init__(self, client: str, incarnation: str) -> None:
        self._client = client
        self._incarnation = incarnation
        self._brokers: dict[str, BrokerClient] = {}

    def take(self, broker_path: str, token: str) -> int:
        """Return the descriptor of a view."""
        if broker_path not in self._brokers:
            self._brokers[broker_path] = BrokerClient(
                Path(broker_path), self._client, self._incarnation
            )
        return self._brokers[broker_path].take(token)


def main() -> None:
    """Obey the vmm until it is gone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--sequence-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--client", required=True)
    parser.add_argument("--incarnation", required=True)
    options = parser.parse_args()
    _tie_to_parent(options.parent_pid)

    page = mmap.mmap(options.sequence_fd, mmap.PAGESIZE, prot=mmap.PROT_READ)
    views = BrokerViews(options.client, options.incarnation)
    channel = socket.socket(fileno=options.channel_fd)
    threading.excepthook = _end_with_bug
    with suppress(ConnectionError):
        GuestProcess(channel, memoryview(page).cast("Q"), views).serve()
    # vCPU threads may be in the middle of an access; there is nothing to save.
    os._exit(0)


def _end_with_bug(problem: threading.ExceptHookArgs) -> None:
    """End the process over a vCPU thread that died: its vmm waits for it."""
    with suppress(BrokenPipeError):
        sys.excepthook(
            problem.exc_type,
            problem.exc_value or problem.exc_type(),
            problem.exc_traceback,
        )
    sys.stderr.flush()
    os._exit(EXIT_BUG)


def _tie_to_parent(parent: int) -> None:
    """Die when the vmm dies; hide from debuggers."""
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((PR_SET_PDEATHSIG, signal.SIGKILL), (PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}) refused")
    if os.getppid() != parent:
        sys.exit("the vmm died while its guest process started")


if __name__ == "__main__":
    main()
