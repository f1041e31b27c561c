"""gmem.memory on real views: a loader process maps them, this process never does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gmem.api.guest_memfd.v1.guest_memfd_pb2 import OpenViewResponse, Range
from gmem.client import GuestMemfdClient
from gmem.runtime.backend import Backend
from tests.support.backends import BOTH
from tests.support.gmemctl import Gmemctl, gmemctl
from tests.support.hosts import wait_until
from tests.support.requirements import require_fuse, require_root

SIZE = 1 << 20
VM = "hosts/local/vms/none"


BACKENDS = BOTH


@pytest.fixture
def ctl(backend: Backend) -> Iterator[Gmemctl]:
    if backend is Backend.FUSE:
        require_fuse()
        require_root()
    with gmemctl() as made:
        words = ("up", "--memory", "1G", "--pool", "2M:1", "--backend", backend.value)
        assert made(*words).status == 0
        yield made


# It waits less for a service that does not come back than people would like.
IMPATIENT_LOADER = """
from gmem.ctl.demo import loader
from gmem.runtime import broker_client

broker_client.BACK_SECONDS_MAX = 1.0
loader.main()
"""


@contextmanager
def loader(
    run: tuple[str, str] = ("-m", "gmem.ctl.demo.loader"),
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, *run]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def ask(child: subprocess.Popen[str], do: str, **arguments: object) -> Any:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
    child.stdin.flush()
    return json.loads(child.stdout.readline())


def client(ctl: Gmemctl) -> GuestMemfdClient:
    return GuestMemfdClient(f"unix:{ctl.base}/local/guest_memfd.sock", client="test")


async def shared_file(ctl: Gmemctl) -> tuple[str, OpenViewResponse]:
    """An inode of 4K pages, all shared, and a token for its host view."""
    async with client(ctl) as guest_memfd:
        made = await guest_memfd.create_guest_memfd(size=SIZE, page_size=4096, vm=VM)
        await guest_memfd.bind_memslot(
            name=made.name,
            vm=VM,
            slot=0,
            base_gfn=0,
            offset=0,
            size=SIZE,
            host_faultable=True,
        )
        return made.name, await guest_memfd.open_view(name=made.name)


async def make_private(ctl: Gmemctl, name: str, offset: int, size: int) -> None:
    async with client(ctl) as guest_memfd:
        converted = Range(name=name, offset=offset, size=size)
        await guest_memfd.convert_range(ranges=[converted], to_shared=False)


def opened(child: subprocess.Popen[str], name: str, view: OpenViewResponse) -> Any:
    return ask(
        child,
        "open",
        token=view.token,
        broker=view.broker_path,
        file=name,
        size=SIZE,
    )


def test_a_private_page_is_refused_with_its_offset(ctl: Gmemctl) -> None:
    name, view = asyncio.run(shared_file(ctl))
    with loader() as child:
        assert opened(child, name, view) == {"ok": {"mapped": SIZE}}
        asyncio.run(make_private(ctl, name, 8192, 4096))
        assert ask(child, "read", size=8192) == {"ok": {"hex": "00" * 8192}}
        refused = ask(child, "read", size=SIZE)["error"]
        assert refused["reason"] == "PAGE_NOT_FAULTABLE"
        assert refused["numbers"] == {"error_offset": 8192}


def test_a_token_works_once(ctl: Gmemctl) -> None:
    name, view = asyncio.run(shared_file(ctl))
    with loader() as first, loader() as second:
        assert "ok" in opened(first, name, view)
        assert opened(second, name, view)["error"]["reason"] == "TOKEN_UNKNOWN"


def test_a_service_that_died_is_named_by_the_next_access(ctl: Gmemctl) -> None:
    name, view = asyncio.run(shared_file(ctl))
    with loader(("-c", IMPATIENT_LOADER)) as child:
        opened(child, name, view)
        assert "ok" in ask(child, "read", size=4096)
        pids = ctl.pids("local")
        # In this order: the keeper would start the service again.
        for service in ("keeper", "guest_memfd"):
            os.kill(pids[service], signal.SIGKILL)
        # Without faults the end is noticed by the broker's connection, a moment later.
        wait_until(lambda: "dead" in ask(child, "read", size=4096), "the end")
        for size in (4096, SIZE):
            dead = ask(child, "read", size=size)["dead"]
            assert dead["service"] == "guest_memfd"
            assert dead["target"] == view.broker_path
            assert "guest_memfd" in dead["sentence"]
    assert ctl("down", "--force").status == 0
    assert ctl.leftovers() == []


def test_a_service_that_is_started_again_is_not_noticed(ctl: Gmemctl) -> None:
    name, view = asyncio.run(shared_file(ctl))
    with loader() as child:
        opened(child, name, view)
        assert "ok" in ask(child, "read", size=4096)
        os.kill(ctl.pids("local")["guest_memfd"], signal.SIGKILL)
        for size in (4096, SIZE):
            assert ask(child, "read", size=size) == {"ok": {"hex": "00" * size}}
