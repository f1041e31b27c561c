"""`make bench` measures: a row on a real host, and the others are not forgotten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.bench import report
from tests.bench.measuring import load_targets
from tests.support.sources import REPOSITORY

SECONDS_MAX = 110


def test_the_benchmark_measures_a_row_and_lists_every_other(tmp_path: Path) -> None:
    results = tmp_path / "bench.json"
    arguments = ("--row", "c,d", "--rounds", "1", "--results", str(results))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.bench", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS_MAX,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr

    entries = {entry["row"]: entry for entry in report.read(results)}
    assert list(entries) == list(load_targets())
    assert all(set(report.FIELDS) <= set(entry) for entry in entries.values())
    for row, entry in entries.items():
        if row in "cd":
            assert entry["outcome"] in ("met", "missed"), entry
            assert entry["ours"] > 0 < entry["reference"], entry
        else:
            assert entry["outcome"] == report.NOT_RUN, entry
