"""A host that somebody else runs, and demo programs in containers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from gmem.ctl import lifecycle
from gmem.ctl.demo import command, containers
from gmem.ctl.demo.children import ChildEndedError
from gmem.ctl.demo.containers import Containers
from gmem.ctl.directories import HostDirectory
from gmem.ctl.elsewhere import host_elsewhere
from gmem.ctl.errors import ControlError
from gmem.uapi.errors import TransportError

TARGETS = "host_allocator=a:1 vmm-0=unix:/run/gmem/vmm-0.sock"


def test_the_targets_are_the_services() -> None:
    state = host_elsewhere({"GMEM_TARGETS": TARGETS, "GMEM_HOST": "one"})
    assert state is not None
    assert state.host == "one"
    assert state.elsewhere
    assert state.dead == ()
    assert state.service("host_allocator").target == "a:1"
    assert state.service("vmm-0").target == "unix:/run/gmem/vmm-0.sock"


@pytest.mark.parametrize("text", ["", "  \n"])
def test_without_targets_there_is_no_such_host(text: str) -> None:
    assert host_elsewhere({"GMEM_TARGETS": text}, "any") is None
    assert host_elsewhere({}) is None


@pytest.mark.parametrize("text", ["vmm-0", "=x", "vmm-0=", "vmm-0 = x"])
def test_what_is_no_target_is_named(text: str) -> None:
    with pytest.raises(ControlError, match="is no target"):
        host_elsewhere({"GMEM_TARGETS": text})


def test_another_host_is_not_looked_for_there() -> None:
    environ = {"GMEM_TARGETS": TARGETS}
    assert host_elsewhere(environ, "host0") is not None
    with pytest.raises(ControlError, match="describes host host0, not local"):
        host_elsewhere(environ, "local")


def test_status_asks_the_targets(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    asked: list[str] = []

    async def check(target: str) -> bool:
        asked.append(target)
        if len(asked) < 3:
            raise TransportError("not yet", target=target)
        return True

    monkeypatch.setattr(lifecycle, "check_health", check)
    monkeypatch.setenv("GMEM_TARGETS", "vmm-0=v:1")
    good = lifecycle.status(tmp_path, None, wait_seconds=0, as_json=True)
    assert not good
    states = json.loads(capsys.readouterr().out)["services"]
    assert [(s["service"], s["state"]) for s in states] == [("vmm-0", "silent")]
    assert lifecycle.status(tmp_path, None, wait_seconds=30, as_json=False)
    assert asked == ["v:1"] * 3


@pytest.mark.parametrize("programs", [None, Path("/run/demo")])
def test_programs_go_with_a_host_elsewhere(
    programs: Path | None, tmp_path: Path
) -> None:
    elsewhere = host_elsewhere({"GMEM_TARGETS": TARGETS}) if programs is None else None
    with pytest.raises(ControlError, match="--programs goes with"):
        command.run(
            HostDirectory(tmp_path, "demo"),
            None,
            as_json=True,
            elsewhere=elsewhere,
            programs=programs,
        )


@contextmanager
def program(name: str, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A demo program that listens, as its container's first process."""
    path = directory / f"{name}.sock"
    child = subprocess.Popen(
        [sys.executable, "-m", f"gmem.ctl.demo.{name}", f"--socket={path}"],
        stdin=subprocess.DEVNULL,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@asynccontextmanager
async def listening(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Containers, int]]:
    """Containers whose standard input is a pipe; the end to write to."""
    out, into = os.pipe()
    with os.fdopen(out) as stdin, os.fdopen(into, "w"):
        monkeypatch.setattr(sys, "stdin", stdin)
        async with Containers(directory) as made:
            yield made, into


async def test_a_program_in_a_container_answers_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(tmp_path, monkeypatch) as (made, into):
        with program("device", tmp_path) as child:
            there = await made.connect("device")
            assert there.where.startswith("container ")
            with pytest.raises(TransportError, match="broker"):
                await there.ask(
                    *("open",), token="x", broker="none", file="f", offset=0, size=1
                )
            assert not (tmp_path / "device.sock").exists()
            ending = asyncio.create_task(there.end())
            assert await asyncio.to_thread(child.wait, 20) == 0
            assert not ending.done()
            os.write(into, b"device 0\n")
            assert await ending == 0


async def test_an_exit_code_of_an_engine_tells_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(tmp_path, monkeypatch) as (made, into):
        with program("victim", tmp_path) as child:
            there = await made.connect("victim")
            child.send_signal(signal.SIGBUS)
            # The engine may be first to notice.
            os.write(into, b"loader 0\nvictim 135\n")
            with pytest.raises(ChildEndedError, match=r"signal 7 \(SIGBUS\)") as caught:
                await there.ask("touch")
            assert caught.value.status == -7


async def test_a_program_that_does_not_come_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "APPEAR_SECONDS_MAX", 0.3)
    async with listening(tmp_path, monkeypatch) as (made, _):
        with pytest.raises(ControlError, match=r"no loader at .*: start its container"):
            await made.connect("loader")
