"""Every line of the conformance list, in every lineage and page size it belongs to.

One host for all of them; behind each the runner looks whether it left it as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gmem.testing.conformance import cases
from gmem.testing.conformance.emulator import PAGE_SIZES, Emulator
from gmem.testing.conformance.registry import Planned, plan
from gmem.testing.conformance.runner import CaseResult, Outcome, run_one, unused
from gmem.uapi.lineage import Lineage

# Some lines are thousands of calls.
pytestmark = [
    pytest.mark.conformance,
    pytest.mark.fuse,
    pytest.mark.timeout(600),
]

assert cases.__all__
PLANNED = [
    one for one in plan(known=PAGE_SIZES) if one.page_size in PAGE_SIZES[one.lineage]
]
RESULTS: dict[str, CaseResult] = {}


@pytest.mark.parametrize("planned", PLANNED, ids=str)
def test_conformance(planned: Planned, gmem_kernel: Emulator) -> None:
    result = run_one(gmem_kernel, planned)
    RESULTS[str(planned)] = result
    if result.outcome is Outcome.SKIP:
        pytest.skip(result.reason)
    assert result.outcome is not Outcome.FAIL, result.reason


@pytest.mark.parametrize("lineage", list(Lineage), ids=str)
def test_every_deviation_was_met(
    lineage: Lineage, gmem_kernel: Emulator, report_line: Callable[[str], None]
) -> None:
    results = [result for result in RESULTS.values() if result.lineage == lineage]
    if not results:
        pytest.skip("no case of the lineage has run here")
    met = [row for result in results for row in result.met]
    for row in dict.fromkeys(met):
        report_line(f"{lineage}: met {met.count(row)} times: {row}")
    assert list(unused(gmem_kernel, lineage, results)) == []


def test_every_lineage_of_the_host_is_played(gmem_kernel: Emulator) -> None:
    played = set(gmem_kernel.capabilities.page_sizes)
    assert set(gmem_kernel.vmm.get_capabilities().lineages) == played
