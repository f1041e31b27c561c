"""The sample project, with the wheel in a venv of its own: it finds its one mistake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.support.sources import REPOSITORY

# Most of it is the installation of what the wheel depends on.
pytestmark = [pytest.mark.fuse, pytest.mark.slow, pytest.mark.timeout(600)]

PROJECT = REPOSITORY / "docs" / "examples" / "vmm_project"
PYTEST = {"pytest", "pluggy", "iniconfig", "packaging"}
MISTAKE = "test_the_guest_hears_of_a_refused_conversion[RFC_V2-4K]"
SECONDS_MAX = 500


def run(
    *words: str | Path, cwd: Path, ok: bool = True
) -> subprocess.CompletedProcess[str]:
    kept = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
    ended = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=kept,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS_MAX,
        stdin=subprocess.DEVNULL,
    )
    assert not ok or ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def locked(names: set[str]) -> str:
    """The lines of the development lock about some distributions."""
    kept: list[str] = []
    wanted = False
    for line in (REPOSITORY / "requirements-dev.lock").read_text().splitlines():
        if not line.startswith((" ", "#")):
            wanted = line.partition("==")[0] in names
        if wanted:
            kept.append(line)
    return "\n".join(kept) + "\n"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv that has the wheel, what the wheel depends on, and pytest."""
    base = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", base)
    run(sys.executable, *pip, *build, REPOSITORY, cwd=base)
    run(sys.executable, "-m", "venv", "--without-pip", base / "venv", cwd=base)
    (base / "pytest.lock").write_text(locked(PYTEST))
    found = base / "venv" / "bin" / "python"
    there = (sys.executable, *pip, "--python", found)
    install = (*there, "install", "--no-deps", "--no-compile")
    locks = (REPOSITORY / "requirements.lock", base / "pytest.lock")
    named = [word for lock in locks for word in ("--requirement", lock)]
    run(*install, "--require-hashes", *named, cwd=base)
    (wheel,) = base.glob("*.whl")
    run(*install, wheel, cwd=base)
    run(*there, "check", cwd=base)
    return found


def test_the_project_finds_its_mistake_and_nothing_else(
    python: Path, tmp_path: Path
) -> None:
    project = shutil.copytree(PROJECT, tmp_path / "project")
    report = tmp_path / "report.xml"
    command = ("-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}")
    ended = run(python, *command, cwd=project, ok=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr

    tests = ET.parse(report).getroot().findall(".//testcase")
    failed = [test for test in tests if test.find("failure") is not None]
    assert [test.get("name") for test in failed] == [MISTAKE], ended.stdout
    assert len(tests) == 7
    assert not any(test.find("error") is not None for test in tests), ended.stdout
    assert "the guest believes that its shared page is private" in ended.stdout

    (kept,) = (project / "gmem-artifacts").iterdir()
    trace = (kept / "trace.txt").read_text()
    assert trace.index("PinPages answered") < trace.index("UnpinPages answered")
    assert (kept / "state.json").stat().st_size > 0


def test_the_wheel_alone_runs_the_conformance_list(
    python: Path, tmp_path: Path
) -> None:
    gmemctl = python.with_name("gmemctl")
    words = ("conformance", "--lineage", "RFC_V2", "--id", "C087", "--id", "C001")
    ended = run(gmemctl, *words, cwd=tmp_path)
    assert "RFC_V2" in ended.stdout
    assert "deviations met: 1" in ended.stdout
