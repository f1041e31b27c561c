"""Runs named tests in processes of their own, with a mutant or without."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.mutants.mutant import SITE, Mutant
from tests.mutants.startup.mutant_hook import VARIABLE
from tests.support.sources import REPOSITORY

SECONDS_MAX: Final = 600
_FAILED: Final = 1
_PYTEST: Final = (
    *(sys.executable, "-X", "faulthandler", "-m", "pytest"),
    *("--exitfirst", "--quiet", "--no-header", "--tb=short"),
    # The named test may be of a ring that plain pytest leaves out.
    *("-m", "", "-p", "no:xdist", "-p", "no:cacheprovider"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run of tests came to; `problem` is empty where it is as it has to be."""

    problem: str
    seconds: float


def require_passed(tests: Sequence[str], options: Sequence[str] = ()) -> Verdict:
    """Run tests without a mutant: all of them have to pass."""
    ended, seconds = _run([*tests, *options], os.environ.copy())
    problem = "" if ended.returncode == 0 else f"without a mutant: {_tail(ended)}"
    return Verdict(problem, seconds)


def require_caught(mutant: Mutant) -> Verdict:
    """Run the named test with its mutant: it has to fail, and by a failed test."""
    try:
        if mutant.source == mutant.path.read_text():
            return Verdict("it changes nothing", 0.0)
    except LookupError as error:
        return Verdict(f"no longer applies: {error}", 0.0)
    with tempfile.TemporaryDirectory(prefix="gmem-mutant-") as directory:
        described = Path(directory) / "mutant.json"
        mutant.describe(described)
        old = os.environ.get("PYTHONPATH")
        environment = os.environ | {
            VARIABLE: str(described),
            "PYTHONPATH": os.pathsep.join([str(SITE), *([old] if old else [])]),
        }
        ended, seconds = _run([mutant.caught_by, *mutant.options], environment)
    if ended.returncode == 0:
        return Verdict("SURVIVED", seconds)
    if ended.returncode != _FAILED:
        return Verdict(f"status {ended.returncode}: {_tail(ended)}", seconds)
    return Verdict("", seconds)


def _run(
    arguments: Sequence[str], environment: dict[str, str]
) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gmem-mutant-") as artefacts:
        ended = subprocess.run(
            [*_PYTEST, f"--gmem-artifacts={artefacts}", *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
            check=False,
        )
    return ended, time.monotonic() - began


def _tail(ended: subprocess.CompletedProcess[str]) -> str:
    return (ended.stdout + ended.stderr)[-2000:]
