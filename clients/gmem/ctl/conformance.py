"""`gmemctl conformance`: the conformance list against a kernel, case by case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gmem.ctl.errors import ControlError, ExitStatus
from gmem.ctl.output import console, print_json, print_table
from gmem.testing.conformance import cases
from gmem.testing.conformance.backends import open_backend
from gmem.testing.conformance.kvm import LINEAGES, Backend
from gmem.testing.conformance.registry import Planned, all_cases, plan
from gmem.testing.conformance.runner import CaseResult, Outcome, run_all

COLUMNS = ("ID", "LINEAGE", "CASE", "OUTCOME", "REASON")


def run(
    lineage: str | None, backend: str, ids: Sequence[str], *, as_json: bool
) -> ExitStatus:
    """Run what was chosen; REFUSED where anything failed. Raises ControlError."""
    _require_known(lineage, ids)
    with open_backend(backend) as kernel:
        planned = _planned(kernel, lineage, ids)
        results = list(run_all(kernel, planned))
    if as_json:
        print_json(as_values(results))
    else:
        _print(results)
    failed = any(result.outcome is Outcome.FAIL for result in results)
    return ExitStatus.REFUSED if failed else ExitStatus.DONE


def as_values(results: Sequence[CaseResult]) -> list[dict[str, Any]]:
    """Return one object per lineage, as JSON has it."""
    return [
        {
            "lineage": lineage,
            "results": [
                {
                    "id": result.id,
                    "case": result.case,
                    "outcome": result.outcome.value,
                    "reason": result.reason,
                }
                for result in results
                if result.lineage == lineage
            ],
        }
        for lineage in dict.fromkeys(result.lineage for result in results)
    ]


def _require_known(lineage: str | None, ids: Sequence[str]) -> None:
    assert cases.__all__, "the cases are registered by being imported"
    if lineage is not None and lineage not in LINEAGES:
        raise ControlError(f"--lineage {lineage}: there are {', '.join(LINEAGES)}")
    known = {one.id for one in all_cases()}
    for number in ids:
        if number not in known:
            raise ControlError(
                f"--id {number}: no line of the list; there are {min(known)} to "
                f"{max(known)}, with gaps"
            )


def _planned(
    kernel: Backend, lineage: str | None, ids: Sequence[str]
) -> Sequence[Planned]:
    wanted = [lineage] if lineage is not None else []
    planned = list(plan(kernel, lineages=wanted, ids=ids))
    if not planned:
        has = ", ".join(kernel.capabilities.page_sizes)
        what = " ".join([*wanted, *ids])
        raise ControlError(
            f"the backend {kernel.name} plays {has}, and nothing there is {what}: "
            "choose another lineage or id"
        )
    return planned


def _print(results: Sequence[CaseResult]) -> None:
    rows = [(r.id, r.lineage, r.case, r.outcome.value, r.reason) for r in results]
    print_table(COLUMNS, rows)
    counts = Counter(result.outcome for result in results)
    words = [f"{counts[outcome]} {outcome.value}" for outcome in Outcome]
    met = {row.number for result in results for row in result.met}
    numbers = ", ".join(str(number) for number in sorted(met)) or "none"
    console().print(f"{', '.join(words)}; deviations met: {numbers}", markup=False)
