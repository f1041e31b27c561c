"""`python -m gmem.host_allocator`: the memory of one emulated host, as a process.

Exit status: 0 after a stop, EXIT_USAGE where the host's shape cannot be, else that of
`gmem.runtime.server.run_service`.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence

from gmem.host_allocator import codec, servicer
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.rows import HostRows, fits, restore
from gmem.runtime.config import HostShape, ServiceConfig
from gmem.runtime.journal import Journal, JournalRefusedError
from gmem.runtime.log import logger
from gmem.runtime.server import Runtime, open_journal, run_service, wait_for_start
from gmem.uapi.pages import format_size

EXIT_USAGE = 2


def first_handle() -> int:
    """Return where the handles of this incarnation begin: not where another's lie."""
    return secrets.randbits(31) << 32 | 1


def main(argv: Sequence[str] | None = None) -> int:
    """Boot the host's memory and serve it; return the exit status."""
    config = ServiceConfig.load("host_allocator", argv)
    if not wait_for_start(config):
        return 0
    try:
        shape = HostShape.load(config)
        memory = codec.host_memory(shape, first_handle=first_handle())
    except (OSError, ValueError) as error:
        logger.critical("cannot boot", error=str(error))
        return EXIT_USAGE

    async def start(runtime: Runtime) -> None:
        runtime.use(open_journal(config))
        await servicer.start(runtime, await recover(runtime, memory))

    return run_service(config, start)


async def recover(runtime: Runtime, booted: HostMemory) -> HostMemory:
    """Return the memory that the journal tells of, `booted` where it is new.

    From then on every change goes into the journal. JournalRefusedError for the
    journal of another machine.
    """
    journal = runtime.journal
    assert journal is not None
    memory = booted
    if journal.is_new:
        report_shortfalls(booted)
    else:
        memory = _restored(journal, booted)
        logger.info("recovered", reservations=len(memory.reservations()))
    rows = HostRows(memory, restored=not journal.is_new)
    journal.loaded()
    # One call is one step: what has changed when it is answered is what it changed.
    journal.collect = rows.changes
    journal.record(rows.changes())
    await journal.committed()
    return memory


def _restored(journal: Journal, booted: HostMemory) -> HostMemory:
    nodes_pages = [len(node.frames) for node in booted.nodes]
    if not fits(journal.rows, nodes_pages):
        raise JournalRefusedError(
            f"{journal.path} is of a machine with other nodes than host.json or "
            "GMEM_HOST_SHAPE: give it the same shape, or another --run-dir"
        )
    return restore(journal.rows)


def report_shortfalls(memory: HostMemory) -> None:
    """Warn of each pool that memory was too small for, as the kernel does at boot."""
    for pool, missing in memory.boot_shortfalls:
        logger.warning(
            "pool too small",
            page_size=format_size(pool.page_size),
            node=pool.node,
            asked=pool.nr_huge_pages,
            missing=missing,
        )


if __name__ == "__main__":
    sys.exit(main())
