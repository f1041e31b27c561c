"""Where hosts live, and that nothing else is ever removed."""

from __future__ import annotations

import dataclasses
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gmem.ctl import launcher
from gmem.ctl.directories import HostDirectory, base_directory, locked
from gmem.ctl.errors import ControlError, ExitStatus
from gmem.ctl.processes import TAG_VARIABLE, record
from gmem.ctl.state import (
    HostState,
    ServiceRecord,
    boot_id,
    read_state,
    require_state,
    write_state,
)


@pytest.mark.parametrize(
    ("option", "environ", "expected"),
    [
        ("/o", {"GMEM_RUN_DIR": "/g", "XDG_RUNTIME_DIR": "/x"}, "/o"),
        (None, {"GMEM_RUN_DIR": "/g", "XDG_RUNTIME_DIR": "/x"}, "/g"),
        (None, {"XDG_RUNTIME_DIR": "/x"}, "/x/gmem"),
        (None, {}, f"/tmp/gmem-{os.getuid()}"),
    ],
)
def test_the_base_is_chosen_in_order(
    option: str | None, environ: dict[str, str], expected: str
) -> None:
    given = None if option is None else Path(option)
    assert base_directory(given, environ) == Path(expected)


def test_a_path_too_long_for_a_socket_is_refused_with_its_length() -> None:
    directory = HostDirectory(Path("/" + "x" * 90), "demo")
    with pytest.raises(ControlError, match=r"116 bytes.*107.*--run-dir"):
        directory.require_short()
    HostDirectory(Path("/" + "x" * 81), "demo").require_short()


def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ControlError, match=r"drwxrwxrwx.*--run-dir"), locked(shared):
        pass


def test_a_base_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ControlError, match="--run-dir"),
        locked(tmp_path / "file" / "b"),
    ):
        pass


def test_a_directory_that_no_up_made_is_never_removed(tmp_path: Path) -> None:
    directory = HostDirectory(tmp_path, "docs")
    directory.path.mkdir()
    (directory.path / "thesis.tex").write_text("years of work")
    with pytest.raises(ControlError, match="is no run directory"):
        launcher.clean_leftovers(directory)
    assert (directory.path / "thesis.tex").exists()


def test_a_state_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    directory = HostDirectory(tmp_path, "h")
    directory.path.mkdir()
    for text in ("{}", "[]", "no json", '{"version": 99, "services": []}'):
        directory.state.write_text(text)
        with pytest.raises(ControlError, match="no state file"):
            launcher.clean_leftovers(directory)


def state_of(host: str, pid: int, start_time: int, **changes: Any) -> HostState:
    service = ServiceRecord("host_allocator", pid, start_time, "unix:/x")
    state = HostState(host, "t" * 32, boot_id(), (service,))
    return dataclasses.replace(state, **changes)


def test_the_state_file_keeps_everything(tmp_path: Path) -> None:
    directory = HostDirectory(tmp_path, "h")
    assert read_state(directory) is None
    directory.create()
    state = state_of("h", 1, 2)
    write_state(directory, state)
    assert read_state(directory) == state
    assert require_state(directory).service("host_allocator").pid == 1
    with pytest.raises(ControlError, match="host h has no 'vmm-9'"):
        state.service("vmm-9")


def test_a_host_that_is_not_there_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ControlError) as caught:
        require_state(HostDirectory(tmp_path, "h"))
    assert caught.value.status is ExitStatus.UNREACHABLE
    assert f"gmemctl up --host h --run-dir {tmp_path}" in caught.value.sentence


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    directory = HostDirectory(tmp_path, "h")
    directory.create()
    # Pid 1 lives, but did not start then.
    write_state(directory, state_of("h", 1, 987654321987))
    (directory.path / "guest_memfd.sock").write_text("")
    told: list[str] = []
    launcher.clean_leftovers(directory, told.append)
    assert not directory.path.exists()
    assert str(directory.path) in told[0]


def test_what_was_left_before_a_reboot_is_removed(tmp_path: Path) -> None:
    me = record("me", os.getpid())
    assert me is not None
    directory = HostDirectory(tmp_path, "h")
    directory.create()
    write_state(directory, state_of("h", me.pid, me.start_time, boot_id="another"))
    launcher.clean_leftovers(directory)
    assert not directory.path.exists()


def test_an_up_that_was_killed_at_its_start_leaves_no_trouble(tmp_path: Path) -> None:
    directory = HostDirectory(tmp_path, "h")
    directory.create()
    launcher.clean_leftovers(directory)
    assert not directory.path.exists()


def test_a_second_up_says_that_the_host_runs(tmp_path: Path) -> None:
    me = record("me", os.getpid())
    assert me is not None
    directory = HostDirectory(tmp_path, "h")
    directory.create()
    write_state(directory, state_of("h", me.pid, me.start_time))
    with pytest.raises(ControlError, match=r"runs already.*gmemctl down --host h"):
        launcher.clean_leftovers(directory)
    assert directory.state.exists()


@contextmanager
def broken_host(tmp_path: Path, seconds: float) -> Iterator[tuple[Any, Any]]:
    """A host whose only service has ended, and a child of that which lasts longer."""
    directory, tag = HostDirectory(tmp_path, "h"), secrets.token_hex(16)
    directory.create()
    write_state(directory, state_of("h", 1, 987654321987, tag=tag))
    environ = os.environ | {TAG_VARIABLE: tag}
    with subprocess.Popen(["sleep", str(seconds)], env=environ) as child:
        try:
            yield directory, child
        finally:
            child.kill()


def test_what_ends_with_its_service_is_waited_for(tmp_path: Path) -> None:
    with broken_host(tmp_path, 0.5) as (directory, child):
        launcher.clean_leftovers(directory)
        assert child.poll() == 0
        assert not directory.path.exists()


def test_what_does_not_end_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "ENDING_SECONDS_MAX", 0.1)
    with broken_host(tmp_path, 60.0) as (directory, child):
        with pytest.raises(ControlError, match=f"is broken.* {child.pid}: .*--force"):
            launcher.clean_leftovers(directory)
        assert directory.state.exists()


def test_reasons_are_found_in_logs(tmp_path: Path) -> None:
    log = tmp_path / "x.jsonl"
    log.write_text(
        '{"event": "ready"}\nready\n{"event": "cannot", "error": "no\\n  fuse"}\nbye\n'
    )
    assert launcher.reason_in(log) == "no fuse"
    log.write_text("Traceback:\nModuleNotFoundError: x\n")
    assert launcher.reason_in(log) == "ModuleNotFoundError: x"
    log.write_text("")
    assert launcher.reason_in(log) == "it said nothing"
