"""An ordinary user for tests that run as root: nobody, with a directory to be at home.

`UserPlace` is a machine as nobody usually finds it, in a mount namespace of its own:
/dev/fuse is for everybody there, and fusermount3 is installed as Debian does (setuid).
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from gmem.testing.leaks import wait_for_none
from tests.support.requirements import require_fuse, require_programs, require_root

NOBODY: Final = (65534, 65534)
ROOT: Final = Path(__file__).parents[2]
FUSE_DEVICE: Final = os.makedev(10, 229)
GONE_SECONDS_MAX: Final = 20.0
ANSWER_SECONDS_MAX: Final = 100.0
LOADED: Final = (
    "gmem.ctl.main",
    "gmem.ctl.demo.command",
    "gmem.ctl.demo.victim",
    "gmem.device",
    "gmem.guest_memfd.__main__",
    "gmem.host_allocator.__main__",
    "gmem.keeper.__main__",
    "gmem.memory",
    "gmem.vmm.__main__",
    "gmem.vmm.guest.__main__",
    "tests.support.memory_client",
)
"""What nobody's processes load."""
PROGRAMS: Final = ("fusermount3", "setpriv", "unshare", "nsenter")


@pytest.fixture(scope="session")
def public_python() -> Iterator[dict[str, str]]:
    """What an interpreter needs that everybody may run; empty where ours is one.

    Where it lies in somebody's home it is shown below a directory of its own, and what
    it loads is compiled there: who may not write that down compiles all of it each
    time, which takes a service three times as long as its start.
    """
    require_root()
    if _nobody_can_run(sys.executable):
        yield {}
        return
    place, bytecode = (Path(f"/tmp/{kind}-{os.getpid()}") for kind in ("gpy", "gpyc"))
    for made in (place, bytecode):
        made.mkdir(mode=0o755)
    subprocess.run(["mount", "--bind", sys.base_prefix, place], check=True)
    try:
        paths = [str(ROOT / part) for part in ("protos", "services", "clients")]
        paths += [path for path in sys.path if path.endswith("site-packages")]
        name = Path(os.path.realpath(sys.executable)).name
        python = {
            "executable": str(place / "bin" / name),
            "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
            # Its own, not that of a distribution's Python of the same version.
            "LD_LIBRARY_PATH": str(place / "lib"),
            "PYTHONPYCACHEPREFIX": str(bytecode),
        }
        assert _nobody_can_run(python["executable"])
        subprocess.run(
            [python["executable"], "-c", f"import {', '.join(LOADED)}"],
            env=os.environ | python,
            check=True,
        )
        yield python
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
        place.rmdir()
        shutil.rmtree(bytecode)


@pytest.fixture
def reachable_python(
    public_python: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have services started by an interpreter that everybody may run."""
    for name, value in public_python.items():
        if name == "executable":
            monkeypatch.setattr(sys, "executable", value)
        else:
            monkeypatch.setenv(name, value)


def status_of(pid: int) -> dict[str, str]:
    """Return the lines of /proc/PID/status by their names."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _nobody_can_run(executable: str) -> bool:
    command = [executable, "-c", "import sys"]
    try:
        return subprocess.run(command, user=NOBODY[0], check=False).returncode == 0
    except PermissionError:
        return False


@dataclass(frozen=True)
class UserPlace:
    """What nobody has: `base` with a home and a run directory, and the namespace."""

    base: Path
    holder: subprocess.Popen[bytes]

    @property
    def runtime(self) -> Path:
        """XDG_RUNTIME_DIR."""
        return self.base / "run"

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs `words` there as nobody."""
        uid, gid = NOBODY
        # Not looked up in the PATH that the program is given.
        enter, become = (shutil.which(name) or name for name in ("nsenter", "setpriv"))
        return [
            *(enter, f"--mount=/proc/{self.holder.pid}/ns/mnt", become),
            *(f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--inh-caps=-all"),
            *words,
        ]

    def environment(self, **more: str) -> dict[str, str]:
        usual = {
            "HOME": str(self.base / "home"),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "PATH": "/usr/bin:/bin",
        }
        given = ("PYTHONPATH", "LD_LIBRARY_PATH", "PYTHONPYCACHEPREFIX")
        usual |= {name: os.environ[name] for name in given if name in os.environ}
        return usual | more

    def run(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a program as nobody, to its end."""
        return subprocess.run(
            self.command(*words),
            env=self.environment(**more),
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=ANSWER_SECONDS_MAX,
        )

    def gmemctl(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "gmem.ctl", *words, **more)

    def mounts(self) -> list[str]:
        """Return the lines of the namespace's mount table that are mounts of ours."""
        lines = Path(f"/proc/{self.holder.pid}/mountinfo").read_text().splitlines()
        return [line for line in lines if str(self.runtime) in line]


@contextmanager
def user_place(*, setuid: bool = True) -> Iterator[UserPlace]:
    """Make the place; at the end nothing that names it may be left."""
    require_fuse()
    require_root()
    require_programs(*PROGRAMS)
    base = Path(tempfile.mkdtemp(prefix="gu-", dir="/tmp"))
    base.chmod(0o755)
    for name in ("home", "run"):
        (base / name).mkdir(mode=0o700)
        os.chown(base / name, *NOBODY)
    os.mknod(base / "fuse", 0o666 | stat.S_IFCHR, FUSE_DEVICE)
    (base / "fuse").chmod(0o666)
    program = Path(shutil.which("fusermount3") or "")
    shutil.copy(program, base / "fusermount3")
    (base / "fusermount3").chmod(0o4755 if setuid else 0o755)
    binds = f"mount --bind {base}/fuse /dev/fuse && "
    binds += f"mount --bind {base}/fusermount3 {program.resolve()} && "
    holder = subprocess.Popen(
        [
            *("unshare", "--mount", "--propagation", "private", "sh", "-c"),
            f"cd / && {binds} echo ready && exec sleep infinity",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            pytest.skip("needs to bind a device in a mount namespace of its own")
        place = UserPlace(base, holder)
        yield place
        assert place.mounts() == []
        assert list(place.runtime.iterdir()) == []
        assert wait_for_none(place.runtime, GONE_SECONDS_MAX) == []
    finally:
        holder.kill()
        holder.communicate()
        shutil.rmtree(base, ignore_errors=True)
