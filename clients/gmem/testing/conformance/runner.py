"""Runs cases one by one and says how each ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gmem.testing.conformance.deviations import DEVIATIONS, Deviation
from gmem.testing.conformance.kvm import Backend
from gmem.testing.conformance.registry import Planned, all_cases
from gmem.testing.conformance.scene import CaseFailedError, CaseSkipped, Scene

UNUSED: Final = "unused"


class Outcome(StrEnum):
    """How a case ended."""

    PASS = "pass"  # noqa: S105 - an outcome
    FAIL = "fail"
    SKIP = "skip"
    DEVIATION = "deviation"


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One line of the report; `met` are the deviations."""

    lineage: str
    id: str
    case: str
    outcome: Outcome
    reason: str = ""
    met: tuple[Deviation, ...] = ()


def run_all(backend: Backend, planned: Iterable[Planned]) -> Iterator[CaseResult]:
    """Run cases; behind the last of a lineage tell of deviations that nobody met."""
    results: dict[str, list[CaseResult]] = {}
    for one in planned:
        result = run_one(backend, one)
        results.setdefault(one.lineage, []).append(result)
        yield result
    for lineage, of_lineage in results.items():
        yield from unused(backend, lineage, of_lineage)


def unused(
    backend: Backend, lineage: str, results: Iterable[CaseResult]
) -> Iterator[CaseResult]:
    """Yield a fail for each deviation that nobody met though its cases all ran."""
    results = list(results)
    skipped = {r.id for r in results if r.outcome is Outcome.SKIP}
    ran = {r.id for r in results} - skipped
    used = {row for r in results for row in r.met}
    has = {one.id for one in all_cases() if lineage in one.lineages}
    for row in DEVIATIONS.get(backend.name, ()):
        cases = has.intersection(row.cases)
        if lineage in row.lineages and cases and cases <= ran and row not in used:
            name, reason = f"deviation {row.number}", f"{row}: no case met it"
            yield CaseResult(lineage, name, UNUSED, Outcome.FAIL, reason)


def run_one(backend: Backend, planned: Planned) -> CaseResult:
    """Run one case on a scene of its own."""
    reason = missing(backend, planned)
    if reason:
        return _result(planned, Outcome.SKIP, reason)
    backend.begin()
    scene = Scene(backend, planned)
    try:
        try:
            planned.case.body(scene)
        finally:
            scene.close()
        left = backend.leftovers()
    except CaseSkipped as skipped:
        return _result(planned, Outcome.SKIP, str(skipped))
    except CaseFailedError as failed:
        return _result(planned, Outcome.FAIL, str(failed))
    except Exception as error:  # noqa: BLE001 - one broken case stops no other
        return _result(planned, Outcome.FAIL, f"{type(error).__name__}: {error}")
    if left:
        return _result(planned, Outcome.FAIL, "left behind: " + "; ".join(left))
    if scene.deviations:
        rows = tuple(dict.fromkeys(scene.deviations))
        reason = "; ".join(str(row) for row in rows)
        return _result(planned, Outcome.DEVIATION, reason, rows)
    return _result(planned, Outcome.PASS)


def missing(backend: Backend, planned: Planned) -> str:
    """Return why a case cannot be run by a backend; empty where it can."""
    has = backend.capabilities
    if has.nothing:
        return has.nothing
    for feature in sorted(planned.case.needs - has.features):
        return has.missing.get(feature, f"the backend has no {feature.value}")
    return ""


def _result(
    planned: Planned,
    outcome: Outcome,
    reason: str = "",
    met: tuple[Deviation, ...] = (),
) -> CaseResult:
    return CaseResult(planned.lineage, planned.id, planned.name, outcome, reason, met)
