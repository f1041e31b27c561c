"""A keeper, a server of views and client processes, started and cleaned for a test."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.runtime import fdpass

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = 4096
ANSWER_SECONDS_MAX = 50.0


class Remote:
    """A process that obeys fdpass messages; its attributes are its operations."""

    def __init__(self, module: str, *arguments: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket = ours
        self.socket.settimeout(ANSWER_SECONDS_MAX)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                cwd=REPOSITORY,
                env=python_environment(),
            )

    def ask(self, op: str, /, **fields: Any) -> Any:
        self.tell(op, **fields)
        return self.answer()

    def tell(self, op: str, /, fds: tuple[int, ...] = (), **fields: Any) -> None:
        fdpass.send(self.socket, {"op": op, **fields}, fds)

    def answer(self) -> Any:
        message = fdpass.receive(self.socket)
        if message is None:
            raise EOFError(f"process ended with {self.process.wait(10)}")
        if "error" in message.fields:
            raise RuntimeError(message.fields["error"])
        return message.fds[0] if message.fds else message.fields["ok"]

    def call(self, name: str, *args: Any) -> Any:
        return self.ask("call", args=[name, *args])

    def exit_status(self) -> int:
        return self.process.wait(ANSWER_SECONDS_MAX)

    def end(self) -> None:
        self.socket.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


class World:
    """One host's keeper and views below `root`; `dir` is where clients open them.

    With `mounted=False` nothing is mounted anywhere: clients need `open_view`.
    """

    def __init__(
        self,
        root: Path,
        *,
        pages: int = 1 << 20,
        mounted: bool = True,
        take_over_seconds: float = 30.0,
        restarts_max: int = 5,
        **options: Any,
    ) -> None:
        self.run_dir = root / "run"
        self.dir = root / "mnt"
        self.clients: list[Remote] = []
        self.said: list[str] = []
        self.keeper = subprocess.Popen(
            [
                *(sys.executable, "-m", "gmem.keeper", "--run-dir", str(self.run_dir)),
                *("--store-pages", str(pages)),
                *("--take-over-seconds", str(take_over_seconds)),
                *("--restarts-max", str(restarts_max)),
                *(("--mount-point", str(self.dir)) if mounted else ()),
            ],
            env=python_environment(),
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for((self.run_dir / "keeper.sock").exists)
        self.options = options
        self.connection: int = self.serve()
        if mounted:
            wait_for(lambda: f" {self.dir} " in Path("/proc/mounts").read_text())

    def serve(self) -> int:
        """Start a server of the views: the first one, or a successor."""
        self.server = Remote("tests.support.view_server", str(self.run_dir))
        fdpass.send(self.server.socket, self.options)
        connection: int = self.server.answer()
        return connection

    def kill(self) -> None:
        """Kill the server, and wait for its end."""
        self.server.process.kill()
        self.server.exit_status()
        self.server.socket.close()

    def log(self) -> list[dict[str, Any]]:
        """What the keeper has said; it has ended."""
        assert self.keeper.stderr is not None
        if not self.keeper.stderr.closed:
            self.said += list(self.keeper.stderr)
        return [json.loads(line) for line in self.said]

    def add(self, ino: int = 1, size: int = 64 * PAGE, page_size: int = PAGE) -> Path:
        self.server.ask("add", ino=ino, size=size, page_size=page_size)
        return self.dir / f"inode-{ino}"

    def client(self, path: Path | int, length: int = 64 * PAGE) -> Remote:
        """Start a process that has the view (a path, or a descriptor) mapped."""
        client = Remote("tests.support.view_client")
        self.clients.append(client)
        if isinstance(path, Path):
            client.ask("open", args=[str(path)])
        else:
            client.tell("fds", fds=(path,))
            client.answer()
            os.close(path)
        client.ask("mmap", args=[length])
        return client

    def statistics(self) -> dict[str, int]:
        found: dict[str, int] = self.server.ask("statistics")
        return found

    def end(self) -> None:
        for client in self.clients:
            client.end()
        self.server.end()
        self.keeper.terminate()
        try:
            self.keeper.wait(20)
        except subprocess.TimeoutExpired:
            self.keeper.kill()
            self.keeper.wait(20)
        assert self.keeper.stderr is not None
        self.log()
        self.keeper.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


MakeWorld = Callable[..., World]


def set_state(
    world: World,
    start: int,
    stop: int,
    state: PageState,
    view: ViewKind = ViewKind.HOST,
) -> None:
    world.server.ask("state", ino=1, view=view, start=start, stop=stop, state=state)


def invalidate(
    world: World, start: int, stop: int, view: ViewKind = ViewKind.HOST
) -> None:
    world.server.ask("invalidate", ino=1, view=view, start=start, stop=stop)


def revoke(world: World, start: int, stop: int) -> None:
    """Close a range of the host view, as a conversion to private does."""
    set_state(world, start, stop, PageState.CLOSING)
    invalidate(world, start, stop)
    set_state(world, start, stop, PageState.CLOSED)


def touch_without_waiting(client: Remote, pgoff: int = 0) -> None:
    client.tell("load", args=[pgoff * PAGE])


def parked(world: World, count: int = 1) -> Callable[[], bool]:
    return lambda: world.statistics()["parked_now"] == count


def wait_for(condition: Any, seconds_max: float = 20.0) -> None:
    deadline = time.monotonic() + seconds_max
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds_max} s: {condition}")
        time.sleep(0.01)


def python_environment() -> dict[str, str]:
    """The environment of a child that imports the project from this tree."""
    roots = [str(REPOSITORY / root) for root in ("protos", "services", "clients", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(roots)}
