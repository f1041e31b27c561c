"""Guest processes that do not start, do not read, do not end; and a vmm that dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmem.client import VmmClient
from gmem.client.program import fill
from gmem.uapi.errors import InUse, Reason
from gmem.uapi.pages import PAGE_SIZE
from gmem.vmm import guest_channel, guests
from gmem.vmm.guest.messages import Decoder, Message, Resume, RunProgram
from gmem.vmm.guest_channel import GuestChannel
from gmem.vmm.guests import Guests
from tests.support.vmm_host import GPA, SIZE, vmm_host

VM = "hosts/host0/vms/v"


async def test_guest_that_does_not_start_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    started = Guests()
    with pytest.raises(InUse, match="did not start") as refused:
        await started.start(VM, "test", "1")
    assert refused.value.reason is Reason.GUEST_GONE
    assert started.find(VM) is None


async def test_guest_that_says_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "sleeper"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(guests, "START_SECONDS_MAX", 0.2)
    monkeypatch.setattr(guests, "END_SECONDS_MAX", 0.2)
    with pytest.raises(InUse, match="no word from it") as refused:
        await Guests().start(VM, "test", "1")
    assert not Path(f"/proc/{refused.value.numbers['pid']}").exists()


async def test_stopped_guest_holds_up_no_invalidation_and_is_killed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "END_SECONDS_MAX", 0.3)
    async with vmm_host(tmp_path) as host:
        await host.boot()
        pid = (await host.client.get_vm(host.vm)).guest_pid
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        for gfn in range(200):
            await host.client.invalidate_begin(vm=host.vm, gfn=gfn, npages=1)
            await host.client.invalidate_end(vm=host.vm, gfn=gfn, npages=1)
        assert time.monotonic() - started < 20
        await host.client.delete_vm(name=host.vm)
        assert not Path(f"/proc/{pid}").exists()


async def test_channel_keeps_the_order_of_what_the_socket_does_not_take() -> None:
    ours, theirs = socket.socketpair()
    gone: list[bool] = []
    channel = GuestChannel(ours, lambda message: None, lambda: gone.append(True))
    file = os.memfd_create("passed")
    said: list[Message] = []
    for number in range(40):
        said += [RunProgram(0, number, bytes(50_000)), Resume(0, number, number)]
    for message in said:
        channel.send(message, file if isinstance(message, Resume) else None)

    heard: list[Message] = []
    files: list[int] = []
    decoder = Decoder()
    theirs.setblocking(False)
    while len(heard) < len(said):
        await asyncio.sleep(0)
        try:
            data, fds, _, _ = socket.recv_fds(theirs, 1 << 16, 8)
        except BlockingIOError:
            continue
        files += fds
        heard += decoder.feed(data)
    assert heard == said
    assert len(files) == 40
    assert {os.fstat(fd).st_ino for fd in files} == {os.fstat(file).st_ino}
    channel.close()
    channel.close()
    channel.send(said[0])
    assert gone == [True]
    for fd in (*files, file):
        os.close(fd)
    theirs.close()


async def test_guest_that_never_reads_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guest_channel, "OUTGOING_BYTES_MAX", 1 << 20)
    ours, theirs = socket.socketpair()
    gone: list[bool] = []
    channel = GuestChannel(ours, lambda message: None, lambda: gone.append(True))
    with theirs:
        file = os.memfd_create("passed")
        for number in range(40):
            channel.send(RunProgram(0, number, bytes(50_000)), file)
        os.close(file)
    assert gone == [True]
    assert not channel.alive


async def test_channel_ends_with_its_peer() -> None:
    ours, theirs = socket.socketpair()
    gone = asyncio.Event()
    channel = GuestChannel(ours, lambda message: None, gone.set)
    theirs.close()
    channel.send(Resume(0, 0, 0))
    await asyncio.wait_for(gone.wait(), 10)
    assert not channel.alive


async def test_guest_dies_with_its_vmm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gmem.vmm", "--name", "vmm-0"]
    process = subprocess.Popen(
        [*command, "--run-dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        assert await asyncio.to_thread(process.stdout.readline) == b"ready\n"
        async with VmmClient(f"unix:{tmp_path}/vmm-0.sock") as client:
            vm = await client.create_vm(vm_id="v")
        guest = Path(f"/proc/{vm.guest_pid}")
        assert b"gmem.vmm.guest" in (guest / "cmdline").read_bytes()
        # PR_SET_DUMPABLE 0: its files below /proc are root's, whoever runs it.
        assert (guest / "mem").stat().st_uid == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    async with asyncio.timeout(20):
        while _alive(guest):
            await asyncio.sleep(0.02)


async def test_two_vcpus_run_side_by_side(tmp_path: Path) -> None:
    async with vmm_host(tmp_path) as host:
        shared = await host.boot()
        await host.client.create_vcpu(vm=host.vm, vcpu=1)
        half = SIZE // 2
        await asyncio.gather(
            host.run(*[fill(GPA, half, 1)] * 20, vcpu=0),
            host.run(*[fill(GPA + half, half, 2)] * 20, vcpu=1),
        )
        assert shared.read(half - PAGE_SIZE, 2 * PAGE_SIZE) == (
            b"\1" * PAGE_SIZE + b"\2" * PAGE_SIZE
        )


def _alive(process: Path) -> bool:
    """Whether it runs: one that nobody has reaped yet is dead."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
