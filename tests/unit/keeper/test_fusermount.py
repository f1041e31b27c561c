"""What fusermount3 is asked, and what becomes of its refusals; no mount is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gmem.keeper import fusermount, making, mounts


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fusermount3 that notes how it was called, and does what a test writes."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    return place / "fusermount3"


def write(program: Path, *lines: str) -> None:
    called = program.parent / "called"
    text = ["#!/bin/sh", f'echo "$_FUSE_COMMFD" "$@" >> {called}', *lines]
    program.write_text("\n".join(text) + "\n")
    program.chmod(0o755)


def test_without_the_program_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="install the package fuse3"):
        fusermount.mount(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_what_it_says_is_told_and_the_mount_point_goes(
    tmp_path: Path, program: Path
) -> None:
    write(program, "echo fusermount3: no device >&2", "exit 1")
    with pytest.raises(OSError, match="fusermount3: no device"):
        fusermount.mount(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    (line,) = (program.parent / "called").read_text().splitlines()
    number, *words = line.split()
    assert int(number) > 2
    assert words[0] == "-o"
    assert {"nosuid", "nodev", "noexec", "subtype=gmem"} <= set(words[1].split(","))
    assert words[2:] == ["--", str(tmp_path / "run" / "mnt")]


def test_one_that_sends_no_descriptor_is_refused(tmp_path: Path, program: Path) -> None:
    write(program, "exit 0")
    with pytest.raises(OSError, match="sent no descriptor"):
        fusermount.mount(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("user_allow_other\n", True), ("#user_allow_other\nmount_max = 5\n", False)],
)
def test_others_are_let_in_where_the_configuration_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, *, allowed: bool
) -> None:
    path = tmp_path / "fuse.conf"
    monkeypatch.setattr(fusermount, "CONFIGURATION", path)
    assert not fusermount.others_allowed()
    path.write_text(text)
    assert fusermount.others_allowed() is allowed


def test_where_nobody_may_mount_both_reasons_are_named(
    tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(program, "echo fusermount3: not you >&2", "exit 1")

    def refused(_fd: int) -> int:
        raise PermissionError(1, "fsopen: Operation not permitted")

    monkeypatch.setattr(making, "_open_fuse", lambda: os.open("/dev/null", os.O_RDWR))
    monkeypatch.setattr(mounts, "mount_detached", refused)
    with pytest.raises(making.CannotKeep) as caught:
        making.make(1, tmp_path / "run")
    assert "fsopen: Operation not permitted" in str(caught.value)
    assert "fusermount3: not you" in str(caught.value)
