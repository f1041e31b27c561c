"""gmemctl conformance: what it refuses, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gmem.ctl import conformance
from gmem.ctl.errors import ControlError, ExitStatus
from gmem.testing.conformance import backends
from gmem.testing.conformance.deviations import DEVIATIONS
from gmem.testing.conformance.kvm import RFC_V2, Backend, Capabilities, Vm
from gmem.testing.conformance.runner import CaseResult, Outcome
from gmem.uapi.errors import Errno
from gmem.uapi.flags import VmType
from gmem.uapi.pages import PAGE_SIZE


class Nobody(Backend):
    """A kernel that refuses everything."""

    name = "nobody"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities({RFC_V2: (PAGE_SIZE,)}, frozenset(), {})

    def create_vm(self, *, lineage: str, vm_type: VmType) -> Vm:
        raise OSError(Errno.EMFILE, f"no VM of {lineage}, {vm_type.name}")

    def close(self) -> None:
        pass


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    @contextmanager
    def opened() -> Iterator[Backend]:
        yield Nobody()

    monkeypatch.setitem(backends.BACKENDS, "nobody", opened)
    return "nobody"


def test_results_are_lists_by_lineage() -> None:
    row = DEVIATIONS["emulator"][0]
    results = [
        CaseResult("RFC_V1", "C001", "4K", Outcome.PASS),
        CaseResult("RFC_V2", "C001", "1G", Outcome.DEVIATION, str(row), (row,)),
        CaseResult("RFC_V1", "C002", "2M", Outcome.SKIP, "no pools"),
    ]
    one, two = conformance.as_values(results)
    assert one == {
        "lineage": "RFC_V1",
        "results": [
            {"id": "C001", "case": "4K", "outcome": "pass", "reason": ""},
            {"id": "C002", "case": "2M", "outcome": "skip", "reason": "no pools"},
        ],
    }
    assert [result["outcome"] for result in two["results"]] == ["deviation"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_fail_is_exit_status_1(
    nobody: str, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    ended = conformance.run(RFC_V2, nobody, ["C002", "C087"], as_json=as_json)
    assert ended is ExitStatus.REFUSED
    out = capsys.readouterr().out
    if not as_json:
        assert "1 fail, 1 skip" in out
        return
    ((lineage),) = json.loads(out)
    assert lineage["lineage"] == RFC_V2
    fail, skip = lineage["results"]
    assert (fail["outcome"], skip["outcome"]) == ("fail", "skip")
    assert "no VM of RFC_V2" in fail["reason"]
    assert skip["reason"] == "the backend has no vCPUs that run small programs"


@pytest.mark.parametrize(
    ("lineage", "backend", "ids", "sentence"),
    [
        ("RFC_V9", "nobody", [], "--lineage RFC_V9: there are RFC_V1, "),
        (None, "other", [], "--backend other: there are emulator, kernel"),
        (None, "nobody", ["C999"], "--id C999: no line of the list"),
        ("RFC_V1", "nobody", [], "the backend nobody plays RFC_V2, and nothing"),
        (None, "nobody", ["C019"], "nothing there is C019"),
    ],
)
def test_a_wrong_choice_says_what_there_is(
    nobody: str, lineage: str | None, backend: str, ids: list[str], sentence: str
) -> None:
    with pytest.raises(ControlError, match=sentence) as refused:
        conformance.run(lineage, backend, ids, as_json=False)
    assert refused.value.status is ExitStatus.USAGE
