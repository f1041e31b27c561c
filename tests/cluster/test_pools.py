"""gmemctl pool, vm, numastat, page-types: asked of a real host."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from gmem.client import VmmClient
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.gmemctl import Gmemctl, gmemctl
from tests.support.requirements import require_fuse, require_root

NODES, NODE_SIZE = 2, 8 << 30


@pytest.fixture
def ctl() -> Iterator[Gmemctl]:
    require_fuse()
    require_root()
    with gmemctl() as made:
        up = made("up", "--memory", "8G", "--pool", "1G:2", "--pool", "2M:8")
        assert up.status == 0, up.err
        yield made


def pools_of(ctl: Gmemctl) -> dict[int, dict[str, Any]]:
    found: list[dict[str, Any]] = ctl("pool", "list", "--json").json["pools"]
    return {pool["page_size"]: pool for pool in found}


def test_pools_are_changed_and_listed(ctl: Gmemctl) -> None:
    assert ctl("pool", "list").out == (
        "      Size  Minimum  Current  Maximum  Default\n"
        "   2097152        8        8        8        *\n"
        "1073741824        2        2        2         \n"
    )
    assert ctl("pool", "resize", "1G:+2").status == 0
    assert ctl("pool", "resize", "1G:-1@1").status == 0
    nodes = pools_of(ctl)[SIZE_1G]["nodes"]
    assert [node["nr_huge_pages"] for node in nodes] == [2, 1]
    assert ctl("pool", "overcommit", "2M:5").status == 0
    assert pools_of(ctl)[SIZE_2M]["maximum"] == 13

    would = ctl("pool", "demote", "1G:1@0", "--validate-only", "--json").json
    done = ctl("pool", "demote", "1G:1@0", "--json").json
    assert (done["demoted_pages"], done["target_pages"]) == (1, 512)
    assert would["target"] == done["target"]
    assert pools_of(ctl)[SIZE_2M]["current"] == 520

    too_much = ctl("pool", "resize", "1G:99")
    assert too_much.status == 1
    assert "pages could not be done" in too_much.err
    refused = ctl("pool", "overcommit", "1G:1")
    assert refused.status == 1
    assert refused.err.startswith("gmemctl: EINVAL (argument_invalid)")


def test_numastat_and_page_types_count_all_memory(ctl: Gmemctl) -> None:
    rows = ctl("numastat", "--json").json["rows"]
    assert rows["HugePages_Total"] == [8.0, 8.0, 16.0]
    assert "Per-node system memory usage (in MBs):" in ctl("numastat").out
    types = ctl("page-types", "--json").json["types"]
    assert sum(kind["nr_pages"] for kind in types) == NODES * NODE_SIZE // PAGE_SIZE
    heads = [t for t in types if t["words"] == ["compound_head", "huge"]]
    assert heads[0]["nr_pages"] == 10
    assert "compound_tail,huge" in ctl("page-types").out


def test_vms_of_all_vmms_are_listed(ctl: Gmemctl) -> None:
    assert ctl("vm", "ls", "--json").json == {"vms": []}

    async def create() -> None:
        async with VmmClient(f"unix:{ctl.base}/local/vmm-0.sock") as vmm:
            await vmm.create_vm(vm_id="first")

    asyncio.run(create())
    (vm,) = ctl("vm", "ls", "--json").json["vms"]
    assert (vm["name"], vm["vmm"]) == ("hosts/local/vms/first", "vmm-0")
    assert "SW_PROTECTED" in ctl("vm", "ls").out
