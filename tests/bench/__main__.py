"""``python -m tests.bench [--row a,c] [--rounds 5]``: measure, write, print.

Exit status 0 when every row was measured, whether it met its target or not; 1 when one
could not be.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from tests.bench import report
from tests.bench.children import WorkerProcess, worker_process
from tests.bench.measuring import (
    Result,
    Target,
    alternate,
    load_targets,
    result_of,
    unmeasured,
)
from tests.bench.rows import ROWS
from tests.bench.scene import SMALL, TMPFS, VMMS, SkippedError, scene_of
from tests.bench.whole_hosts import large_host, start_of_a_host
from tests.support.hosts import Host, running_host
from tests.support.requirements import FUSE_DEVICE
from tests.support.sources import REPOSITORY

RESULTS: Final = REPOSITORY / "build" / "bench.json"
ROUNDS: Final = 5
WIDTH_MIN: Final = 110
WHOLE_HOSTS: Final[dict[str, Callable[[Target, int], Result]]] = {
    "k": start_of_a_host,
    "l": large_host,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the chosen rows; return the exit status."""
    targets = load_targets()
    chosen, rounds, results_path = _arguments(argv, targets)
    console = Console()
    if console.width < WIDTH_MIN:
        console = Console(width=WIDTH_MIN)
    if missing := _missing():
        results = [unmeasured(targets[row], f"skipped: {missing}") for row in chosen]
    else:
        results = _measure(chosen, targets, rounds, console)
    report.write(results_path, targets, results)
    report.show(targets, results, console)
    return int(any(result.outcome.startswith("failed") for result in results))


def _arguments(
    argv: Sequence[str] | None, targets: dict[str, Target]
) -> tuple[list[str], int, Path]:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--row", default="", help="rows, e.g. a,c; default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    chosen = given.row.split(",") if given.row else list(targets)
    unknown = set(chosen) - set(targets)
    if unknown or given.rounds < 1:
        parser.error(f"rows are {','.join(targets)}, and rounds at least 1")
    return [row for row in targets if row in chosen], given.rounds, given.results


def _missing() -> str:
    """Say what this machine lacks; nothing where all is there."""
    if os.geteuid() != 0:
        return f"needs root to mount, runs as uid {os.geteuid()}"
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        return f"needs {FUSE_DEVICE}"
    return ""


def _measure(
    chosen: list[str], targets: dict[str, Target], rounds: int, console: Console
) -> list[Result]:
    results: list[Result] = []
    on_one_host = [row for row in chosen if row in ROWS]
    if on_one_host:
        with (
            # Nothing is to load while something is measured.
            running_host(SMALL, VMMS, under=TMPFS, spare=False) as host,
            worker_process() as worker,
        ):
            for row in on_one_host:
                target = targets[row]
                measure = _on_one_host(host, worker, target, rounds)
                results.append(_guarded(target, measure, console))
    for row in chosen:
        if row in WHOLE_HOSTS:
            target = targets[row]
            measure = _on_own_hosts(target, rounds)
            results.append(_guarded(target, measure, console))
    return results


def _on_own_hosts(target: Target, rounds: int) -> Callable[[], Result]:
    return lambda: WHOLE_HOSTS[target.row](target, rounds)


def _on_one_host(
    host: Host, worker: WorkerProcess, target: Target, rounds: int
) -> Callable[[], Result]:
    async def measured() -> Result:
        async with scene_of(host, worker) as scene:
            scene.begin_round()
            async with ROWS[target.row](scene) as (ours, reference):
                pairs = await alternate(ours, reference, rounds)
            return result_of(target, pairs, scene.notes)

    return lambda: asyncio.run(measured())


def _guarded(target: Target, measure: Callable[[], Result], console: Console) -> Result:
    """Measure one row; where it fails, the others go on."""
    try:
        result = measure()
    except SkippedError as skipped:
        result = unmeasured(target, f"skipped: {skipped}")
    except Exception as error:  # noqa: BLE001 - one row is reported, the rest go on
        traceback.print_exc()
        text = " ".join(str(error).split())
        result = unmeasured(target, f"failed: {type(error).__name__}: {text}")
    ratio = "" if result.ratio is None else f", ratio {result.ratio:.3g}"
    console.print(f"row {result.row}: {result.outcome}{ratio}", highlight=False)
    return result


if __name__ == "__main__":
    sys.exit(main())
