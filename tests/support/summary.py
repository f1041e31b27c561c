"""``python -m tests.support.summary DIRECTORY``: what all runs of pytest came to.

Reads the JUnit files of a directory, prints each run, every reason for a skip, and a
closing line. Exit status 1 when something failed, or a run had no test at all.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET


@dataclass
class Run:
    """The outcome of one run of pytest."""

    name: str
    passed: int = 0
    failed: int = 0
    skips: Counter[str] = field(default_factory=Counter)

    @property
    def skipped(self) -> int:
        """How many tests did not run."""
        return self.skips.total()


def read_run(path: Path) -> Run:
    """Count the test cases of one JUnit file."""
    run = Run(path.stem)
    for case in ET.parse(path).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            run.failed += 1
        elif skip is not None:
            kind = "expected failure: " if skip.get("type") == "pytest.xfail" else ""
            run.skips[kind + (skip.get("message") or "no reason given")] += 1
        else:
            run.passed += 1
    return run


def main() -> int:
    """Print the summary; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    runs = [read_run(path) for path in sorted(directory.glob("*.xml")) if _junit(path)]
    for run in runs:
        print(f"{run.name}: {run.passed} passed, {run.failed} failed", end=", ")
        print(f"{run.skipped} skipped")
        for reason, count in run.skips.most_common():
            print(f"    {count} skipped: {reason}")
    passed, failed = sum(r.passed for r in runs), sum(r.failed for r in runs)
    print(f"skipped tests: {sum(run.skipped for run in runs)}")
    print(f"{passed} passed, {failed} failed, {sum(r.skipped for r in runs)} skipped")
    empty = [run.name for run in runs if not run.passed + run.failed]
    if empty or not runs:
        print(f"runs without a test: {', '.join(empty) or 'all'}")
    return 1 if failed or empty or not runs else 0


def _junit(path: Path) -> bool:
    return ET.parse(path).getroot().tag in {"testsuites", "testsuite"}


if __name__ == "__main__":
    sys.exit(main())
