"""`python -m gmem.host_allocator` as a process: ready, asked, stopped; or refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gmem.client import HostAllocatorClient
from gmem.host_allocator.__main__ import EXIT_USAGE
from gmem.testing.leaks import leftovers
from gmem.uapi.pages import SIZE_1G, SIZE_2M

SECONDS_MAX = 60
SHAPE = {
    "nodes": [
        {"memory_size": "8G", "huge_pages": {"1G": 6, "2M": 8}},
        # The memmap lies in the last gigabyte: only three 1G pages fit.
        {"memory_size": "4G", "huge_pages": {"1G": 4}},
    ],
    "default_hugepagesize": "1G",
}


def start(run_dir: Path, shape: object) -> subprocess.Popen[str]:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "host.json").write_text(json.dumps(shape))
    command = [sys.executable, "-m", "gmem.host_allocator", "--run-dir", str(run_dir)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GMEM_")}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


async def test_a_host_boots_answers_and_leaves_nothing(tmp_path: Path) -> None:
    with start(tmp_path, SHAPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            target = f"unix:{tmp_path}/host_allocator.sock"
            async with HostAllocatorClient(target) as client:
                pools = {pool.page_size: pool for pool in await client.list_pools()}
                handle = await client.reserve(page_size=SIZE_1G, num_pages=9)
            process.send_signal(signal.SIGTERM)
            _, logged = process.communicate(timeout=SECONDS_MAX)
        finally:
            process.kill()
    assert process.returncode == 0
    assert [node.nr_huge_pages for node in pools[SIZE_1G].nodes] == [6, 3]
    assert pools[SIZE_2M].nr_huge_pages == 8
    # Handles of another incarnation have other upper halves.
    assert handle >> 32
    events = [json.loads(line) for line in logged.splitlines()]
    (short,) = [event for event in events if event["event"] == "pool too small"]
    assert (short["node"], short["asked"], short["missing"]) == (1, 4, 1)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"nodes": []}, "at least 1 item"),
        ({"nodes": [{"memory_size": "4K"}]}, "give it at least 2"),
        (
            {"nodes": [{"memory_size": "1G"}], "default_hugepagesize": "4K"},
            "use 2097152 or 1073741824",
        ),
        (
            {"nodes": [{"memory_size": "1G"}], "nr_overcommit_hugepages": {"1G": 1}},
            "never surplus by overcommit",
        ),
    ],
)
def test_a_shape_that_cannot_be_ends_with_a_sentence(
    tmp_path: Path, shape: object, words: str
) -> None:
    with start(tmp_path, shape) as process:
        _, logged = process.communicate(timeout=SECONDS_MAX)
    assert process.returncode == EXIT_USAGE
    assert words in logged
    assert "Traceback" not in logged
