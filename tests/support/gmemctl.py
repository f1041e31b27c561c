"""gmemctl as a user runs it: a process, with a run directory of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmem.testing.leaks import wait_for_none

SECONDS_MAX = 110


@dataclass(frozen=True)
class Ended:
    """How one command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What `--json` printed."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Gmemctl:
    """Commands below one run directory."""

    base: Path

    @property
    def environ(self) -> dict[str, str]:
        """The environment of a user who chose the directory."""
        return os.environ | {"GMEM_RUN_DIR": str(self.base), "NO_COLOR": "1"}

    def command(self, *words: str) -> list[str]:
        """The command line of `gmemctl words...`."""
        return [sys.executable, "-m", "gmem.ctl", *words]

    def __call__(self, *words: str, prefix: tuple[str, ...] = ()) -> Ended:
        ended = subprocess.run(
            [*prefix, *self.command(*words)],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS_MAX,
            env=self.environ,
            stdin=subprocess.DEVNULL,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def pids(self, host: str) -> dict[str, int]:
        """The services of a host."""
        services = self("status", "--host", host, "--json").json["services"]
        return {service["service"]: service["pid"] for service in services}

    def leftovers(self) -> list[str]:
        """What is left of all hosts: processes, mounts, sockets, files."""
        files = [f"{path} is left" for path in self.base.iterdir()]
        return files + wait_for_none(self.base, 10)


@contextmanager
def gmemctl() -> Iterator[Gmemctl]:
    """A run directory with a short path, whose hosts are killed in the end."""
    base = Path(tempfile.mkdtemp(prefix="gmem-", dir="/tmp"))
    ctl = Gmemctl(base)
    try:
        yield ctl
    finally:
        for directory in list(base.iterdir()):
            ctl("down", "--force", "--host", directory.name)
        shutil.rmtree(base)
