"""A service's life: listen, say "ready", serve, stop in order.

    sys.exit(run_service(config, start))

where `start(runtime)` makes the core and calls `runtime.add(...)` for its servicer.
Health (for each service and for ""), reflection, channelz, limits and the boundary of
`interceptors.py` are there already.

A stop (SIGTERM, SIGINT) goes: health NOT_SERVING, our streams end, the server
waits for calls in progress, operations finish (V9), then what `runtime.on_stop` was
given, last first. A bug in a core is logged, answered with INTERNAL, and ends the
process in the same way with EXIT_BUG.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.metadata
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gmem.api.types.v1.types_pb2 import Capabilities
from gmem.runtime import log
from gmem.runtime.config import SOCKET_PATH_MAX, ServiceConfig
from gmem.runtime.drive import Runner
from gmem.runtime.events import EventLog
from gmem.runtime.interceptors import Boundary
from gmem.runtime.journal import Changes, Journal, JournalRefusedError
from gmem.runtime.log import logger
from gmem.runtime.performer import Performer
from gmem.uapi.lineage import Lineage

EXIT_BUG = 70
EXIT_JOURNAL = 74
EXIT_CANNOT_LISTEN = 73
# After a bug only the answer that says so is waited for.
BUG_STOP_SECONDS = 0.5

_PR_SET_DUMPABLE = 4
_UNIX = "unix:"
_CHANNELZ = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name

S = TypeVar("S")
Start: TypeAlias = "Callable[[Runtime], Awaitable[None]]"


class CannotListenError(OSError):
    """The target is taken, or no place to listen at."""


class Runtime:
    """What a starting service is given."""

    def __init__(self, config: ServiceConfig) -> None:
        """Make the server on the running loop; nothing listens yet."""
        self.config = config
        self.incarnation = secrets.token_hex(8)
        self.events = EventLog()
        self.target = config.listen
        self.stopping = asyncio.Event()
        self.bug: BaseException | None = None
        self.journal: Journal | None = None
        self.journal_failed = False
        self._on_stop = AsyncExitStack()
        self._before_stop: list[Callable[[], None]] = []
        self._runners: list[Runner] = []
        self._names: list[str] = []
        self._boundary = Boundary(
            incarnation=self.incarnation, events=self.events, on_bug=self.on_bug
        )
        self.server = grpc.aio.server(
            interceptors=[self._boundary],
            options=_options(config.listen),
            maximum_concurrent_rpcs=config.concurrent_rpcs_max,
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        channelz.add_channelz_servicer(self.server)

    def add(
        self,
        add_to_server: Callable[[S, Any], None],
        servicer: S,
        descriptor: ServiceDescriptor,
    ) -> None:
        """Serve one gRPC service: its generated function, servicer and descriptor."""
        add_to_server(servicer, self.server)
        self._names.append(descriptor.full_name)

    def runner(self, performer: Performer) -> Runner:
        """Make a Runner whose operations a stop waits for."""
        runner = Runner(performer, on_bug=self.on_bug)
        self._runners.append(runner)
        return runner

    def on_stop(self, close: Callable[[], Awaitable[object]]) -> None:
        """Await `close()` at the end of a stop; the last given comes first."""
        self._on_stop.push_async_callback(close)

    def use(self, journal: Journal) -> Journal:
        """Keep what must survive in `journal`; before anything else is started.

        Replies that it has are known from now on; it is closed last.
        """
        self.journal = journal
        if not journal.is_new:
            self.events.go_on_from(journal.first_revision)
        journal.revision = lambda: self.events.revision
        self._boundary.use(journal)
        loop = asyncio.get_running_loop()

        def failed(error: BaseException) -> None:
            loop.call_soon_threadsafe(self._on_journal_failure, error)

        journal.on_failure = failed
        self.on_stop(partial(asyncio.to_thread, journal.close))
        return journal

    def record(self, changes: Changes) -> None:
        """Have changes journalled, where there is a journal."""
        if self.journal is not None:
            self.journal.record(changes)

    def _on_journal_failure(self, error: BaseException) -> None:
        self.journal_failed = True
        logger.critical("journal failed", error=str(error))
        self.stopping.set()

    def before_stop(self, tell: Callable[[], None]) -> None:
        """Call `tell()` as the first thing of a stop: what waits long gives up."""
        self._before_stop.append(tell)

    def on_bug(self, error: BaseException) -> None:
        """Log a failure that is our own, and end the process."""
        if self.bug is None:
            self.bug = error
        logger.critical("bug", exc_info=error, error=repr(error))
        self.stopping.set()

    def capabilities(self, **more: Any) -> Capabilities:
        """Return what GetCapabilities answers, with the service's own fields added."""
        return Capabilities(
            host=self.config.host,
            service=self.config.service,
            incarnation=self.incarnation,
            version=importlib.metadata.version("gmem-emulator"),
            lineages=[lineage.value for lineage in Lineage],
            **more,
        )

    async def start_serving(self) -> None:
        """Listen, then answer health checks with SERVING. CannotListenError."""
        serving = health_pb2.HealthCheckResponse.SERVING
        for name in self._names:
            await self._health.set(name, serving)
        others = (health.SERVICE_NAME, _CHANNELZ, reflection.SERVICE_NAME)
        names = [*self._names, *others]
        reflection.enable_server_reflection(names, self.server)
        self.target = _listen(self.server, self.config.listen)
        await self.server.start()

    async def stop_serving(self) -> None:
        """End calls in the order of the module docstring."""
        seconds = self.config.stop_seconds if self.bug is None else BUG_STOP_SECONDS
        for tell in self._before_stop:
            tell()
        await self._health.enter_graceful_shutdown()
        self.events.close()
        self._boundary.end_streams()
        await self.server.stop(seconds)
        for runner in self._runners:
            left = await runner.drain(seconds)
            if left:
                logger.error("operations cut off", number=left)

    async def close(self) -> None:
        """Close what `on_stop` was given."""
        await self._on_stop.aclose()


@asynccontextmanager
async def serving(config: ServiceConfig, start: Start) -> AsyncIterator[Runtime]:
    """Serve while inside, on the running loop: what a process does, for tests too."""
    runtime = Runtime(config)
    try:
        await start(runtime)
        await runtime.start_serving()
        try:
            yield runtime
        finally:
            await runtime.stop_serving()
    finally:
        await runtime.close()


def wait_for_start(config: ServiceConfig) -> bool:
    """Return True when the service may start; False where nobody says so any more.

    What the service logs from now on is as its configuration says.
    """
    log.configure(service=config.name, host=config.host, level=config.log_level)
    if not config.start_on_stdin:
        return True
    logger.info("loaded", pid=os.getpid())
    return bool(sys.stdin.buffer.readline())


def run_service(config: ServiceConfig, start: Start) -> int:
    """Be the process of one service until it is told to stop; return the exit status.

    0 after a stop, EXIT_BUG after a bug, EXIT_CANNOT_LISTEN where the target is taken,
    EXIT_JOURNAL where the journal cannot be read or written.
    """
    log.configure(service=config.name, host=config.host, level=config.log_level)
    make_undumpable()
    config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return asyncio.run(_serve_until_stopped(config, start))
    except CannotListenError as error:
        logger.critical("cannot listen", error=str(error))
        return EXIT_CANNOT_LISTEN
    except JournalRefusedError as error:
        logger.critical("journal refused", error=str(error))
        return EXIT_JOURNAL


def open_journal(config: ServiceConfig) -> Journal:
    """Open the journal of a service in its run directory. JournalRefusedError."""
    return Journal(config.run_dir / f"{config.name}.db", config.name)


async def _serve_until_stopped(config: ServiceConfig, start: Start) -> int:
    loop = asyncio.get_running_loop()
    async with serving(config, start) as runtime:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, runtime.stopping.set)
        logger.info("ready", target=runtime.target, incarnation=runtime.incarnation)
        with suppress(BrokenPipeError):
            print("ready", flush=True)  # noqa: T201 - who started us waits for it
        await runtime.stopping.wait()
        logger.info("stopping")
    if runtime.bug is not None:
        return EXIT_BUG
    return EXIT_JOURNAL if runtime.journal_failed else 0


def make_undumpable() -> None:
    """Keep other processes of this user from ptrace, pidfd_getfd and /proc/PID/fd."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"PR_SET_DUMPABLE: {os.strerror(number)}")


def _options(listen: str) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [("grpc.so_reuseport", 0)]
    if not listen.startswith(_UNIX):
        # Remote clients send pings to notice a dead network; see gmem.client.
        options += [
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 500),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
        ]
    return options


def _listen(server: grpc.aio.Server, listen: str) -> str:
    """Bind to `listen`; return the target with the port that was chosen."""
    if listen.startswith(_UNIX):
        _remove_stale(Path(listen.removeprefix(_UNIX)))
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise CannotListenError(
            f"{listen} cannot be listened at; stop who has it, or use --listen"
        ) from error
    if listen.startswith(_UNIX):
        return listen
    return f"{listen.rpartition(':')[0]}:{port}"


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens at; refuse one that somebody does."""
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise CannotListenError(
            f"{path} is longer than {SOCKET_PATH_MAX} bytes; use a shorter --run-dir"
        )
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise CannotListenError(f"{path} is in the way: {error}") from error
    raise CannotListenError(f"{path} is served by another process; stop it first")


if __debug__ is False:
    sys.exit("gmem relies on assertions: do not run it with -O")
