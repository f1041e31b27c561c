"""Pools, numastat, page-types and VMs: what is printed, as the known tools print it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gmem.api.host_allocator.v1 import host_allocator_pb2 as ha
from gmem.api.vmm.v1 import vmm_pb2 as vmm
from gmem.ctl import pools, reports, vms
from gmem.ctl.errors import ControlError
from gmem.ctl.main import app
from gmem.uapi.flags import PageFlag
from gmem.uapi.pages import SIZE_1G, SIZE_2M


def statistics() -> ha.GetStatisticsResponse:
    found = ha.GetStatisticsResponse()
    found.meminfo.hugepagesize_kb = 2048
    for node in range(2):
        found.nodes.add(node=node, managed_pages=1 << 20, free_base_pages=1 << 18)
    small = found.pools.add(
        page_size=SIZE_2M,
        nr_huge_pages=6,
        free_huge_pages=4,
        surplus_huge_pages=1,
        nr_overcommit_huge_pages=3,
    )
    small.nodes.add(node=0, nr_huge_pages=4, free_huge_pages=4)
    small.nodes.add(node=1, nr_huge_pages=2, surplus_huge_pages=1)
    found.pools.add(page_size=SIZE_1G, nr_huge_pages=8, free_huge_pages=8)
    return found


def test_pools_are_listed_as_hugeadm_lists_them() -> None:
    assert pools.pool_list_text(statistics()) == (
        "      Size  Minimum  Current  Maximum  Default\n"
        "   2097152        5        6        8        *\n"
        "1073741824        8        8        8         \n"
    )
    values = pools.pool_values(statistics().pools[0], SIZE_2M)
    assert (values["minimum"], values["maximum"], values["default"]) == (5, 8, True)
    assert values["nodes"][1]["surplus_huge_pages"] == 1


@pytest.mark.parametrize(
    ("text", "now", "then"),
    [
        ("1G:8", 3, 8),
        ("1G:+4", 3, 7),
        ("1G:-2", 3, 1),
        ("1G:-9", 3, 0),
        ("2M:0@1", 3, 0),
        (" 2M:+1@0 ", 3, 4),
    ],
)
def test_a_pool_is_set_or_changed(text: str, now: int, then: int) -> None:
    change = pools.parse_change(text)
    assert change.applied_to(now) == then
    assert change.page_size == (SIZE_1G if "1G" in text else SIZE_2M)
    assert change.node == (int(text.strip()[-1]) if "@" in text else None)


@pytest.mark.parametrize("text", ["", "1G", "1G:", "1G:x", "1G:++1", "1G:1@", "3G:1"])
def test_what_is_no_change_of_a_pool_is_refused(text: str) -> None:
    with pytest.raises(ControlError) as caught:
        pools.parse_change(text)
    assert "1G" in caught.value.sentence


def test_what_a_pool_was_set_to_leaves_surplus_out() -> None:
    pool = statistics().pools[0]
    assert [pools.persistent_pages(pool, node) for node in (None, 0, 1)] == [5, 4, 1]


def test_numastat_has_columns_of_15_characters() -> None:
    lines = reports.numastat_text(statistics()).splitlines()
    assert lines[:2] == ["", "Per-node system memory usage (in MBs):"]
    assert lines[2] == " " * 26 + "Node 0" + " " * 10 + "Node 1" + " " * 11 + "Total"
    assert lines[3] == " " * 16 + (" " + "-" * 15) * 3
    assert lines[4] == (
        "MemTotal                 4096.00         4096.00         8192.00"
    )
    rows = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in lines[4:]}
    assert rows["MemUsed"] == [3072.0, 3072.0, 6144.0]
    assert rows["HugePages_Total"] == [8.0, 4.0, 12.0]
    assert rows["HugePages_Surp"] == [0.0, 2.0, 2.0]


def test_page_types_has_the_letters_and_words_of_the_kernels_tool() -> None:
    head = PageFlag.HUGE | PageFlag.COMPOUND_HEAD
    counts = [
        ha.PageFlagCount(flags=0, nr_pages=7),
        ha.PageFlagCount(flags=PageFlag.BUDDY, nr_pages=512),
        ha.PageFlagCount(flags=head, nr_pages=3),
    ]
    lines = reports.page_types_text(counts).splitlines()
    assert lines[0].split() == [
        "flags",
        "page-count",
        "MB",
        "symbolic-flags",
        "long-symbolic-flags",
    ]
    assert lines[2].split() == [
        "0x0000000000000400",
        "512",
        "2",
        "_" * 10 + "B" + "_" * 25,
        "buddy",
    ]
    assert lines[3].endswith("\tcompound_head,huge")
    assert "H_G" in lines[3]
    assert lines[-1].split() == ["total", "522", "2"]
    assert reports.page_type_values(counts)[2]["words"] == ["compound_head", "huge"]


def test_every_flag_of_ours_has_a_word() -> None:
    for flag in PageFlag:
        assert reports.long_symbolic(flag) == [str(flag.name).lower()]


def test_a_vm_is_one_row() -> None:
    vm = vmm.Vm(
        name="hosts/h/vms/a",
        type=vmm.VM_TYPE_SW_PROTECTED,
        lineage="RFC_V1",
        vcpus=[0, 1],
        guest_pid=7,
        guest_alive=True,
    )
    vm.memslots.add(memory_size=SIZE_1G)
    vm.memslots.add(memory_size=SIZE_1G)
    assert vms.vm_row("vmm-0", vm) == (
        "hosts/h/vms/a",
        "vmm-0",
        "SW_PROTECTED",
        "RFC_V1",
        2,
        "2G",
        2,
        7,
        "alive",
    )
    assert vms.vm_row("vmm-0", vmm.Vm(type=vmm.VM_TYPE_DEFAULT))[5] == "0"


@pytest.fixture
def answered(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[ha.UpdatePoolResponse], None]:
    """Have host_allocator answer every question with one message."""

    def answer(response: ha.UpdatePoolResponse) -> None:
        monkeypatch.setattr(pools, "state_of", lambda run_dir, host: None)
        monkeypatch.setattr(pools, "_ask", lambda state, question: response)

    return answer


def test_a_pool_that_could_not_be_filled_ends_with_status_1(
    answered: Callable[[ha.UpdatePoolResponse], None],
) -> None:
    response = ha.UpdatePoolResponse(missing_pages=3)
    response.pool.CopyFrom(statistics().pools[0])
    answered(response)
    result = CliRunner().invoke(app, ["pool", "resize", "2M:9"])
    assert result.exit_code == 1
    assert result.stdout.startswith("2M: 6 pages, 4 free, 0 reserved, 1 surplus")
    assert "3 pages could not be done" in result.stderr

    result = CliRunner().invoke(app, ["pool", "resize", "2M:9", "--json"])
    assert (result.exit_code, result.stderr) == (1, "")
    assert json.loads(result.stdout)["missing_pages"] == 3


def test_a_demotion_has_no_sign(
    answered: Callable[[ha.UpdatePoolResponse], None],
) -> None:
    answered(ha.UpdatePoolResponse())
    result = CliRunner().invoke(app, ["pool", "demote", "1G:+1"])
    assert result.exit_code == 2
    assert "'1G:+1' has a sign" in result.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [("gmemctl p", ["page-types", "pool"]), ("gmemctl pool d", ["demote"])],
)
def test_the_shell_completes_commands(words: str, offered: list[str]) -> None:
    gmemctl = Path(sys.executable).with_name("gmemctl")
    asked = {
        **os.environ,
        "_GMEMCTL_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [gmemctl], env=asked, capture_output=True, text=True, check=False, timeout=60
    )
    assert sorted(done.stdout.split()) == offered
