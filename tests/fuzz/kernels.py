"""The kernels that the fuzzer can play on, by the names of `--backend`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gmem.testing.conformance.emulator import Emulator
from gmem.testing.conformance.kernel import Kernel
from gmem.testing.hosts import running_host
from tests.fuzz.player import Player

KERNEL = "kernel"
EMULATOR = "emulator"
MEMORY = "/dev/shm"


@contextmanager
def player_on(name: str) -> Iterator[Player]:
    """Open a kernel; the emulated host is started, and audited at the end."""
    if name == KERNEL:
        with Kernel() as kernel, Player(kernel) as player:
            yield player
        return
    assert name == EMULATOR, f"{name!r}: say {KERNEL} or {EMULATOR}"
    # Journals in memory: a script is a few hundred of their transactions.
    with running_host(under=MEMORY) as host, Emulator(host) as emulator:
        emulator.begin()
        with Player(emulator) as player:
            yield player
        left = emulator.leftovers()
        assert not left, "; ".join(left)
