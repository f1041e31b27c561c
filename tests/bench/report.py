"""The results: a file that programs read, and a table that people read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tests.bench.measuring import Result, Target, unmeasured

FIELDS: Final = (
    "row",
    "conditions",
    "ours",
    "reference",
    "ratio",
    "target",
    "met",
)
"""What every entry of the file has; `outcome`, `cause` and `rounds` come with it."""
NOT_RUN: Final = "not run"
_STYLES: Final = {"met": "green", "missed": "bold red"}


def write(path: Path, targets: dict[str, Target], results: list[Result]) -> None:
    """Write all rows; those not measured this time keep what the file had."""
    entries = {entry["row"]: entry for entry in read(path)}
    entries |= {result.row: asdict(result) for result in results}
    rows = [
        entries.get(row) or asdict(unmeasured(target, NOT_RUN))
        for row, target in targets.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a file; none where there is no file."""
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = json.loads(path.read_text())
    return entries


def show(targets: dict[str, Target], results: list[Result], console: Console) -> None:
    """Print the table, the causes of what misses, and how many did."""
    table = Table(title="ours against the reference, medians", title_justify="left")
    table.add_column("row")
    table.add_column("what", ratio=1)
    for name in ("ours", "reference", "unit", "ratio", "target", "outcome"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        table.add_row(*_cells(targets[result.row], result))
    console.print(table)
    for result in results:
        if result.outcome == "missed":
            console.print(f"{result.row} missed: {result.cause}")
        elif result.outcome != "met":
            console.print(f"{result.row} {result.outcome}")
    counts = {
        outcome: sum(r.outcome.startswith(outcome) for r in results)
        for outcome in ("met", "missed", "skipped", "failed")
    }
    console.print(", ".join(f"{count} {word}" for word, count in counts.items()))


def _cells(target: Target, result: Result) -> list[str]:
    sign = "\N{GREATER-THAN OR EQUAL TO}"
    if target.better == "less":
        sign = "\N{LESS-THAN OR EQUAL TO}"
    word = result.outcome.partition(":")[0]
    style = _STYLES.get(word, "yellow")
    return [
        result.row,
        target.title,
        _number(result.ours),
        _number(result.reference),
        target.unit,
        _number(result.ratio),
        f"{sign} {target.target:g}",
        f"[{style}]{word}[/]",
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
