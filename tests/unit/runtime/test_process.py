"""A service as a process: ready, logs, signals, bugs."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gmem.client import HostAllocatorClient, Patience
from gmem.client.errors import TransportError
from gmem.runtime.server import EXIT_BUG, EXIT_CANNOT_LISTEN

REPOSITORY = Path(__file__).parents[3]
# What the service says at its end: prctl(PR_GET_DUMPABLE), too.
CLOSED = "closed, dumpable 0\n"
# Serves Reserve; an owner "bug" meets one.
SERVICE = """
import ctypes, sys
from gmem.runtime.config import ServiceConfig
from gmem.runtime.server import run_service
from tests.support.wire import (
    ALLOCATOR, Allocator, add_HostAllocatorServiceServicer_to_server)

async def start(runtime):
    servicer = Allocator()
    async def reserve(request):
        assert request.owner != "bug"
        return 1
    async def closed():
        print("closed, dumpable", ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)
    servicer.reserve = reserve
    runtime.on_stop(closed)
    runtime.add(add_HostAllocatorServiceServicer_to_server, servicer, ALLOCATOR)

sys.exit(run_service(ServiceConfig.load("host_allocator"), start))
"""


@contextmanager
def process(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-c", SERVICE, "--run-dir", str(run_dir)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def ready(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"


def ended(child: subprocess.Popen[str]) -> tuple[int, str, list[dict[str, Any]]]:
    out, err = child.communicate(timeout=30)
    return child.returncode, out, [json.loads(line) for line in err.splitlines()]


def reserve(run_dir: Path, **more: Any) -> int:
    async def call() -> int:
        target = f"unix:{run_dir}/host_allocator.sock"
        patience = Patience(attempts=1)
        async with HostAllocatorClient(target, patience=patience) as client:
            return await client.reserve(page_size=1 << 30, num_pages=1, **more)

    return asyncio.run(call())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_serves_until_it_is_told_to_stop(
    tmp_path: Path, number: signal.Signals
) -> None:
    with process(tmp_path) as child:
        ready(child)
        assert reserve(tmp_path) == 1
        child.send_signal(number)
        status, out, lines = ended(child)
    assert (status, out) == (0, CLOSED)
    assert not (tmp_path / "host_allocator.sock").exists()
    events = [line["event"] for line in lines]
    assert events == ["ready", "answered", "stopping"]
    for line in lines:
        assert (line["service"], line["host"]) == ("host_allocator", "host0")
    assert lines[1]["method"] == "Reserve"
    assert lines[1]["request_id"]


def test_a_bug_is_logged_answered_and_ends_the_process(tmp_path: Path) -> None:
    with process(tmp_path) as child:
        ready(child)
        with pytest.raises(TransportError, match="INTERNAL"):
            reserve(tmp_path, owner="bug")
        status, out, lines = ended(child)
    assert (status, out) == (EXIT_BUG, CLOSED)
    (bug,) = [line for line in lines if line["event"] == "bug"]
    assert bug["level"] == "critical"
    assert "AssertionError" in bug["exception"]
    assert bug["method"] == "Reserve"


def test_a_second_process_of_a_service_says_who_is_in_the_way(tmp_path: Path) -> None:
    with process(tmp_path) as first:
        ready(first)
        with process(tmp_path) as second:
            status, out, lines = ended(second)
        assert status == EXIT_CANNOT_LISTEN
        assert "ready" not in out
        assert "another process" in lines[-1]["error"]
        assert reserve(tmp_path) == 1


def test_a_killed_service_leaves_a_socket_that_the_next_one_takes(
    tmp_path: Path,
) -> None:
    with process(tmp_path) as first:
        ready(first)
        first.kill()
        first.wait(30)
    assert (tmp_path / "host_allocator.sock").exists()
    with process(tmp_path) as second:
        ready(second)
        assert reserve(tmp_path) == 1
