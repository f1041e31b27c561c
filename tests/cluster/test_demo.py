"""The main job: gmemctl demo, whole, and with a service killed in the middle of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmem.ctl.demo.scenario import STEPS_OF
from gmem.uapi.lineage import Lineage
from tests.support.gmemctl import Gmemctl, gmemctl
from tests.support.requirements import require_fuse, require_root

SERVICES = ["host_allocator", "keeper", "guest_memfd", "vmm-0"]
STEPS = [
    "boot",
    "load",
    "forgotten mapping",
    "MADV_DONTNEED",
    "zeroed",
    "populate",
    "hash",
    "victim",
    "second page",
    "share",
    "neighbours",
    "device",
    "pin",
    "plain reference",
    "back",
    "teardown",
]


@pytest.fixture
def ctl() -> Iterator[Gmemctl]:
    require_fuse()
    require_root()
    with gmemctl() as made:
        yield made


def test_every_check_of_the_demo_holds(ctl: Gmemctl) -> None:
    ended = ctl("demo", "--json")
    steps = ended.json["steps"]
    failed = [
        f"{step['name']}: {check['sentence']} ({check['found']})"
        for step in steps
        for check in step["checks"]
        if not check["held"]
    ]
    assert failed == []
    assert [step["name"] for step in steps] == STEPS
    assert (ended.status, ended.err) == (0, "")
    assert ended.json["held"]

    elf = Path(sys.executable).resolve().read_bytes()
    assert ended.json["payload"]["sha256"] == hashlib.sha256(elf).hexdigest()
    assert all(step["checks"] for step in steps)
    assert_counters(steps)
    assert ctl.leftovers() == []


def test_every_check_of_the_demo_holds_in_the_second_series(ctl: Gmemctl) -> None:
    ended = ctl("demo", "--json", "--lineage", "RFC_V2")
    steps = ended.json["steps"]
    failed = [
        f"{step['name']}: {check['sentence']} ({check['found']})"
        for step in steps
        for check in step["checks"]
        if not check["held"]
    ]
    assert failed == []
    assert (ended.status, ended.err) == (0, "")
    assert (ended.json["held"], ended.json["lineage"]) == (True, "RFC_V2")
    names = [step["name"] for step in steps]
    assert names == [step.name for step in STEPS_OF[Lineage.RFC_V2]]
    assert len(names) == 14
    assert "MADV_DONTNEED" not in names
    assert "populate" not in names
    said = "\n".join(sentence for step in steps for sentence in step["said"])
    assert said.count("KVM_GMEM_CONVERT_PRIVATE: EAGAIN (page_in_use)") == 2
    assert steps[-1]["after"] | {"vmemmap_restored": 0} == steps[0]["before"]
    assert ctl.leftovers() == []


def test_every_check_of_the_demo_holds_in_place(ctl: Gmemctl) -> None:
    ended = ctl("demo", "--json", "--lineage", "IN_PLACE")
    steps = ended.json["steps"]
    failed = [
        f"{step['name']}: {check['sentence']} ({check['found']})"
        for step in steps
        for check in step["checks"]
        if not check["held"]
    ]
    assert failed == []
    assert (ended.status, ended.err) == (0, "")
    assert (ended.json["held"], ended.json["lineage"]) == (True, "IN_PLACE")
    names = [step["name"] for step in steps]
    assert names == [step.name for step in STEPS_OF[Lineage.IN_PLACE]]
    assert len(names) == 16
    assert {"share all", "partial"} <= set(names)
    said = "\n".join(sentence for step in steps for sentence in step["said"])
    assert said.count("EAGAIN (page_in_use)") == 3
    assert steps[-1]["after"] | {"vmemmap_restored": 0} == steps[0]["before"]
    assert ctl.leftovers() == []


def test_mainline_has_no_demo_and_says_why(ctl: Gmemctl) -> None:
    ended = ctl("demo", "--lineage", "MAINLINE")
    assert ended.status == 2
    assert "neither 1G pages nor a conversion in place" in ended.err
    assert "RFC_V1 or RFC_V2 or IN_PLACE" in ended.err
    assert ctl.leftovers() == []


def assert_counters(steps: list[dict[str, dict[str, int]]]) -> None:
    """The moves that the story promises, read from the numbers alone."""
    saved = [step["after"]["vmemmap_saved"] for step in steps]
    start = steps[0]["before"]
    first = start["vmemmap_saved"]
    moves = {name: now - first for name, now in zip(STEPS, saved, strict=True)}
    assert moves["load"] == moves["share"] == moves["pin"] == -4095
    assert moves["MADV_DONTNEED"] == moves["back"] == moves["teardown"] == 0
    rsvd = {name: s["after"]["rsvd"] for name, s in zip(STEPS, steps, strict=True)}
    assert (rsvd["boot"], rsvd["load"], rsvd["share"]) == (4, 3, 2)
    end = steps[-1]["after"]
    assert end | {"vmemmap_restored": 0} == start


def test_it_is_told_in_words_with_a_summary(ctl: Gmemctl, tmp_path: Path) -> None:
    payload = tmp_path / "payload"
    payload.write_bytes(os.urandom(3 << 20))
    ended = ctl("demo", "--payload", str(payload))
    assert ended.status == 0, ended.out
    for number, name in enumerate(STEPS, start=1):
        assert f"\n{number}. {name}" in ended.out
        assert f"│ {number}. {name}" in ended.out
    assert ended.out.count("HugePages 1G ") == len(STEPS)
    assert ended.out.count("vmemmap  ") >= len(STEPS)
    assert ended.out.count("stage 2  ") >= len(STEPS)
    assert "EINVAL (page_in_use)" in ended.out
    assert "(gmem-loader)" in ended.out
    assert "died by signal 7 (SIGBUS)" in ended.out
    assert "FAILED" not in ended.out
    assert ctl.leftovers() == []


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("step", ["boot", "load", "share", "device"])
def test_a_killed_service_is_named_and_down_leaves_nothing(
    ctl: Gmemctl, service: str, step: str
) -> None:
    with started(ctl, "demo") as demo:
        # A step is printed at its end: the service dies in the one that follows.
        read_up_to(demo, f"{STEPS.index(step) + 1}. ")
        demo.send_signal(signal.SIGSTOP)
        pid = pids(ctl)[service]
        os.kill(pid, signal.SIGKILL)
        demo.send_signal(signal.SIGCONT)
        _, err = demo.communicate(timeout=100)
    assert demo.returncode == 3
    assert f"{service} (pid {pid}) died" in err
    assert "gmemctl down --host demo" in err
    assert err.count("\n") == 1

    down = ctl("down", "--host", "demo")
    assert (down.status, down.err) == (0, "")
    assert ctl.leftovers() == []


def test_a_killed_service_is_told_in_json_too(ctl: Gmemctl) -> None:
    with started(ctl, "demo", "--json") as demo:
        wait_for_vmm(ctl)
        pid = pids(ctl)["guest_memfd"]
        os.kill(pid, signal.SIGKILL)
        out, err = demo.communicate(timeout=100)
    assert (demo.returncode, err) == (3, "")
    ended = json.loads(out)
    assert not ended["held"]
    assert ended["error"]["service"] == "guest_memfd"
    assert f"guest_memfd (pid {pid}) died" in ended["error"]["sentence"]
    assert ctl("down", "--host", "demo").status == 0
    assert ctl.leftovers() == []


def test_an_interrupted_demo_leaves_nothing(ctl: Gmemctl) -> None:
    with started(ctl, "demo") as demo:
        read_up_to(demo, "2. ")
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=100)
    assert demo.returncode not in {0, 3}
    assert ctl.leftovers() == []


def wait_for_vmm(ctl: Gmemctl) -> None:
    """Wait until the demo has started the last service of its host, and it answers."""
    log = ctl.base / "demo" / "log" / "vmm-0.jsonl"
    deadline = time.monotonic() + 60
    while not log.exists() or '"ready"' not in log.read_text():
        assert time.monotonic() < deadline, "vmm-0 did not start"
        time.sleep(0.01)


def started(ctl: Gmemctl, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ctl.command(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ctl.environ,
    )


def pids(ctl: Gmemctl) -> dict[str, int]:
    """The services, from the state file: to ask them takes longer than a step."""
    state = json.loads((ctl.base / "demo" / "state.json").read_text())
    return {service["name"]: service["pid"] for service in state["services"]}


def read_up_to(demo: subprocess.Popen[str], start: str) -> None:
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith(start):
            return
    pytest.fail(f"the demo ended before {start!r}")


def test_a_host_of_the_name_that_runs_is_left_alone(ctl: Gmemctl) -> None:
    assert ctl("up", "--host", "demo", "--pool", "1G:1").status == 0
    before = ctl.pids("demo")
    ended = ctl("demo")
    assert ended.status == 2
    assert "host demo runs already" in ended.err
    assert ctl.pids("demo") == before
