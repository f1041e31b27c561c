from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gmem.keeper import keep, pids
from gmem.keeper.keep import Keeper, Options
from gmem.keeper.making import Held
from gmem.runtime import fdpass
from gmem.runtime.backend import Backend


@pytest.fixture
def held() -> Iterator[Held]:
    """Descriptors of a connection that knows no RESEND; nobody reads them here."""
    fds = tuple(os.memfd_create(name) for name in ("fuse", "mount", "store"))
    yield Held(Backend.FUSE, fds, nr_pages=1, connection_id=0, survival=False)
    for fd in fds:
        os.close(fd)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with fdpass.listen(tmp_path / keep.SOCKET_NAME) as made:
        yield made


def keep_for(
    keeper: Keeper, listener: socket.socket, act: Callable[[socket.socket], None]
) -> int:
    """Serve one service that does `act` and ends; return the keeper's status."""

    def service() -> None:
        with fdpass.connect(Path(listener.getsockname()), timeout=10) as control:
            message = fdpass.receive(control, fds_max=3)
            assert message is not None
            fdpass.close_all(message.fds)
            act(control)

    thread = threading.Thread(target=service)
    thread.start()
    status = keeper.serve()
    thread.join()
    keeper.close()
    return status


def say(*words: str) -> Callable[[socket.socket], None]:
    def act(control: socket.socket) -> None:
        for word in words:
            fdpass.send(control, {"op": word})

    return act


def test_a_service_that_stops_in_order_ends_the_keeper(
    held: Held, listener: socket.socket, tmp_path: Path
) -> None:
    keeper = Keeper(held, listener, Options(tmp_path))
    assert keep_for(keeper, listener, say("serving", "stopping")) == keep.EXIT_OK


def test_without_resend_the_death_of_the_service_is_final(
    held: Held,
    listener: socket.socket,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    keeper = Keeper(held, listener, Options(tmp_path))
    status = keep_for(keeper, listener, say("serving"))
    assert status == keep.EXIT_SERVICE_DIED
    last = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert last["event"] == "gave_up"
    assert "RESEND" in last["error"]


def test_messages_that_are_none_change_nothing(
    held: Held, listener: socket.socket, tmp_path: Path
) -> None:
    def act(control: socket.socket) -> None:
        control.send(b"no json")
        fdpass.send(control, {"op": "drop", "ino": "x"})
        fdpass.send(control, {"op": "hold"}, [held.store_fd])
        fdpass.send(control, {"op": "note"})
        fdpass.send(control, {"op": "stopping"})

    before = len(list(Path("/proc/self/fd").iterdir()))
    keeper = Keeper(held, listener, Options(tmp_path))
    assert keep_for(keeper, listener, act) == keep.EXIT_OK
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_who_serves_is_written_down(
    held: Held, listener: socket.socket, tmp_path: Path
) -> None:
    keeper = Keeper(held, listener, Options(tmp_path))
    keep_for(keeper, listener, say("stopping"))
    pid, start_time = (tmp_path / pids.SERVICE).read_text().split()
    assert int(pid) == os.getpid()
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert start_time == stat[19]


class DyingService:
    """Stands in for a StandIn whose dead service has a thread that still reads."""

    fd = None
    fds_per_inode = 1
    dead = False

    def __init__(self, *_: object) -> None:
        self.inodes: dict[int, list[int]] = {}
        self.counts: dict[str, int] = {}
        self.readers_left = True
        self.begun = threading.Event()

    def begin(self, dead_pid: int) -> None:
        assert dead_pid == os.getpid()
        self.begun.set()

    def look(self) -> None:
        """It ends when the test says so."""


def test_a_successor_waits_for_the_last_reader_of_the_dead_service(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = DyingService()
    monkeypatch.setattr(keep, "StandIn", lambda *_: dying)
    fds = tuple(os.memfd_create(name) for name in ("fuse", "mount", "store"))
    held = Held(Backend.FUSE, fds, nr_pages=1, connection_id=0, survival=True)
    keeper = Keeper(held, listener, Options(tmp_path))
    answers: list[str] = []

    def die(control: socket.socket) -> None:
        fdpass.send(control, {"op": "serving"})

    def take_over(control: socket.socket) -> None:
        assert dying.begun.is_set()
        fdpass.send(control, {"op": "take_over"})
        control.settimeout(0.5)
        with pytest.raises(TimeoutError):
            fdpass.receive(control)
        answers.append("none yet")
        dying.readers_left = False
        control.settimeout(10)
        answer = fdpass.receive(control)
        assert answer is not None
        answers.append(str(answer.fields))
        fdpass.send(control, {"op": "stopping"})

    def both() -> None:
        for act in (die, take_over):
            with fdpass.connect(Path(listener.getsockname()), timeout=10) as control:
                message = fdpass.receive(control, fds_max=3)
                assert message is not None
                fdpass.close_all(message.fds)
                act(control)
            dying.begun.wait(10)

    thread = threading.Thread(target=both)
    thread.start()
    assert keeper.serve() == keep.EXIT_OK
    thread.join(10)
    keeper.close()
    fdpass.close_all(fds)
    assert answers == ["none yet", "{'ok': True}"]
