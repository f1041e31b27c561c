"""Views as programs meet them: a keeper, a server and clients, each a real process."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gmem.guest_memfd.core.values import PageState, ViewKind
from tests.support.view_world import (
    PAGE,
    MakeWorld,
    Remote,
    World,
    invalidate,
    parked,
    revoke,
    set_state,
    touch_without_waiting,
    wait_for,
)

pytestmark = pytest.mark.fuse

MIB2 = 1 << 21
HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
SIGBUS = -signal.SIGBUS

# What a client sees


@pytest.mark.parametrize("op", ["load", "store"])
def test_a_private_page_is_sigbus_and_its_neighbour_works(
    world: World, op: str
) -> None:
    path = world.add()
    set_state(world, 3, 4, PageState.CLOSED)
    client = world.client(path)
    text = ["x"] if op == "store" else []
    client.ask(op, args=[2 * PAGE, *text])
    client.tell(op, args=[3 * PAGE, *text])
    assert client.exit_status() == SIGBUS


def test_past_the_end_is_sigbus(world: World) -> None:
    client = world.client(world.add(size=4 * PAGE), length=8 * PAGE)
    assert client.ask("load", args=[3 * PAGE]) == "\0"
    touch_without_waiting(client, 4)
    assert client.exit_status() == SIGBUS


def test_two_processes_share_a_page_and_read_zeros_at_first(world: World) -> None:
    path = world.add()
    one, two = world.client(path), world.client(path)
    assert one.ask("load", args=[PAGE, 5]) == "\0" * 5
    one.ask("store", args=[PAGE, "hello"])
    assert two.ask("load", args=[PAGE, 5]) == "hello"


def test_a_refused_page_works_once_it_is_shared_again(world: World) -> None:
    client = world.client(world.add())
    set_state(world, 0, 1, PageState.CLOSED)
    assert client.ask("read", args=[0]) == "EFAULT"
    set_state(world, 0, 1, PageState.OPEN)
    assert client.ask("read", args=[0]) == "\0"


def test_only_touched_pages_get_a_folio(world: World) -> None:
    client = world.client(world.add())
    for pgoff in (0, 1, 2, 40):
        client.ask("load", args=[pgoff * PAGE])
    assert world.server.ask("faults") == [0, 1, 2, 40]
    assert client.call("fstat")["st_blocks"] == 4 * 8


def test_stale_bytes_of_a_frame_are_never_seen(world: World) -> None:
    path = world.add()
    client = world.client(path)
    client.ask("store", args=[0, "secret"])
    # Whole 4K folios are freed; the frame of page 1 stays and must be zeroed.
    world.add(ino=2, size=MIB2, page_size=MIB2)
    other = world.client(world.dir / "inode-2", length=MIB2)
    other.ask("store", args=[PAGE, "secret"])
    other.ask("store", args=[2 * PAGE, "kept"])
    world.server.ask("punch", ino=1, start=0, stop=1)
    world.server.ask("punch", ino=2, start=1, stop=2)
    assert client.ask("load", args=[0, 6]) == "\0" * 6
    assert other.ask("load", args=[PAGE, 6]) == "\0" * 6
    assert other.ask("load", args=[2 * PAGE, 4]) == "kept"


# Revocation


def test_revocation_reaches_every_process_and_keeps_dirty_bytes(world: World) -> None:
    path = world.add()
    one, two = world.client(path), world.client(path)
    one.ask("fill", args=[0, 64 * PAGE, "dirty"])
    assert two.ask("load", args=[63 * PAGE, 5]) == "dirty"
    revoke(world, 0, 63)
    for pgoff in (0, 31, 62):
        assert one.ask("read", args=[pgoff * PAGE]) == "EFAULT"
        assert two.ask("read", args=[pgoff * PAGE]) == "EFAULT"
        assert world.server.ask("get", ino=1, pgoff=pgoff, count=5) == "dirty"
    assert two.ask("load", args=[63 * PAGE, 5]) == "dirty"
    counted = world.statistics()
    assert (counted["syncs"], counted["writes_to_closed"]) == (1, 0)


def test_dirty_bytes_come_back_in_large_pieces(world: World) -> None:
    client = world.client(world.add(size=MIB2, page_size=MIB2), length=MIB2)
    client.ask("fill", args=[0, MIB2, "dirty"])
    revoke(world, 0, 512)
    counted = world.statistics()
    assert counted["pages_written"] >= 512
    # A request carries what lies together in the file: at least half of its limit.
    assert counted["pages_written"] >= 128 * counted["writes"]
    # Readahead does not, where one page may refuse all.
    mounts = Path("/proc/mounts").read_text().splitlines()
    (ours,) = [line for line in mounts if f" {world.dir} " in line]
    assert f"max_read={32 * PAGE}" in ours


def test_no_store_is_lost_under_constant_revocation(world: World) -> None:
    client = world.client(world.add())
    client.ask("load", args=[0])
    client.tell("hammer", args=[[0, PAGE, 2 * PAGE], "write"])
    for _ in range(300):
        invalidate(world, 0, 3)
    client.tell("fds")
    rounds = client.answer()["rounds"]
    client.answer()
    invalidate(world, 0, 3)
    last = (rounds - 1) & 0x7F | 0x80
    assert client.ask("load", args=[0]) == chr(last)
    assert world.statistics()["writes_refused"] == 0


def test_invalidations_of_dirty_ranges_do_not_starve_the_dispatchers(
    make_world: MakeWorld,
) -> None:
    world = make_world(dispatchers=3)
    path = world.add(size=512 * PAGE)
    client = world.client(path, length=512 * PAGE)
    ranges = [[start, start + 16] for start in range(0, 512, 16)]
    for _ in range(3):
        client.ask("fill", args=[0, 512 * PAGE, "dirty"])
        world.server.ask("invalidate_all", ino=1, ranges=ranges)
    assert world.statistics()["pages_written"] == 3 * 512


def test_a_node_nobody_looked_up_is_invalidated_already(world: World) -> None:
    world.add()
    world.server.ask("attach", ino=1, pgoff=0)
    invalidate(world, 0, 64)
    revoke(world, 0, 64)
    assert world.statistics()["invals"] == 2


# Parked READs


def test_a_parked_read_is_sigbus_as_soon_as_its_page_is_closed(world: World) -> None:
    client = world.client(world.add())
    world.server.ask("policy", name="never")
    touch_without_waiting(client)
    wait_for(parked(world))
    set_state(world, 0, 1, PageState.CLOSING)
    assert client.exit_status() == SIGBUS
    invalidate(world, 0, 1)


def test_a_parked_read_ends_after_fault_wait_max(make_world: MakeWorld) -> None:
    world = make_world(fault_wait_max=0.5)
    client = world.client(world.add())
    world.server.ask("policy", name="never")
    before = time.monotonic()
    touch_without_waiting(client)
    assert client.exit_status() == SIGBUS
    # The kernel repeats a failed fault once: the second READ is not parked again.
    assert 0.5 < time.monotonic() - before < 1.0
    assert world.statistics()["timeouts"] == 1


def test_a_refusal_of_the_core_is_sigbus(world: World) -> None:
    client = world.client(world.add())
    world.server.ask("policy", name="refuse")
    touch_without_waiting(client)
    assert client.exit_status() == SIGBUS


@pytest.mark.parametrize("waits_in", ["fault", "fallocate"])
def test_a_killed_client_is_gone_while_the_core_is_silent(
    world: World, waits_in: str
) -> None:
    client = world.client(world.add())
    world.server.ask("policy", name="never")
    if waits_in == "fault":
        touch_without_waiting(client)
        wait_for(parked(world))
    else:
        client.tell("call", args=["fallocate", 3, 0, PAGE])
        wait_for(lambda: world.statistics()["fallocates"] == 1)
    before = time.monotonic()
    client.process.kill()
    assert client.exit_status() == -signal.SIGKILL
    assert time.monotonic() - before < 1.0
    assert world.statistics()["killed"] == 1


def test_a_signal_that_does_not_kill_leaves_the_read_parked(world: World) -> None:
    client = world.client(world.add())
    world.server.ask("policy", name="never")
    touch_without_waiting(client)
    wait_for(parked(world))
    client.process.send_signal(signal.SIGWINCH)
    time.sleep(0.2)
    assert parked(world)()
    world.server.ask("attach", ino=1, pgoff=0)
    set_state(world, 0, 1, PageState.OPEN)
    assert client.answer() == "\0"


# Quiesced ranges and punch hole


def test_a_quiesced_page_waits_without_asking_and_goes_on(world: World) -> None:
    client = world.client(world.add())
    client.ask("store", args=[0, "kept"])
    assert world.server.ask("quiesce", ino=1, start=0, stop=2) == [[0, 2]]
    touch_without_waiting(client)
    wait_for(parked(world))
    asked = world.server.ask("faults")
    set_state(world, 0, 2, PageState.OPEN)
    assert client.answer() == "k"
    assert world.server.ask("faults") == asked


def test_quiescing_a_hole_does_not_wait_for_its_parked_read(world: World) -> None:
    client = world.client(world.add())
    world.server.ask("policy", name="never")
    touch_without_waiting(client)
    wait_for(parked(world))
    before = time.monotonic()
    world.server.ask("quiesce", ino=1, start=0, stop=64)
    assert time.monotonic() - before < 2.0
    world.server.ask("attach", ino=1, pgoff=0)
    set_state(world, 0, 64, PageState.OPEN)
    assert client.answer() == "\0"


@pytest.mark.parametrize("page_size", [PAGE, MIB2], ids=["4K", "2M"])
def test_punching_under_hammering_clients_is_no_sigbus_and_leaves_zeros(
    world: World, page_size: int, report_line: Callable[[str], None]
) -> None:
    path = world.add(size=MIB2, page_size=page_size)
    offsets = [pgoff * PAGE for pgoff in range(8)]
    clients = [world.client(path, length=MIB2) for _ in range(3)]
    for client, kind in zip(clients, ("write", "write", "read"), strict=True):
        client.tell("hammer", args=[offsets, kind])
    for number in range(60):
        stop = 512 if number % 3 == 0 else 8
        world.server.ask("punch", ino=1, start=0, stop=stop)
    results = []
    for client in clients:
        client.tell("fds")
        results.append(client.answer())
        client.answer()
    world.server.ask("punch", ino=1, start=0, stop=8)
    assert [clients[0].ask("load", args=[at]) for at in offsets] == ["\0"] * 8
    assert all(result["rounds"] for result in results)
    counted = world.statistics()
    assert counted["timeouts"] == 0
    assert counted["writes_to_hole"] == 0
    longest = max(result["longest_ms"] for result in results)
    report_line(
        f"quiesce, {page_size}: {counted['quiesce_rounds']} rounds for "
        f"{counted['quiesces']} calls, longest stall of a client {longest} ms"
    )


# System calls on the file


def test_fstat_shows_the_inode(world: World) -> None:
    path = world.add(ino=7, size=2 * MIB2, page_size=MIB2)
    client = world.client(path, length=2 * MIB2)
    first = client.call("fstat")
    assert (first["st_size"], first["st_blksize"]) == (2 * MIB2, MIB2)
    assert first["st_blocks"] == 0
    client.ask("load", args=[MIB2 + PAGE])
    assert client.call("fstat")["st_blocks"] == MIB2 // 512
    other = world.client(world.add(ino=8))
    assert other.call("fstat")["st_ino"] != first["st_ino"]


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (["ftruncate", 0], "EINVAL"),
        (["ftruncate", 1 << 30], "EINVAL"),
        (["fsync"], "EINVAL"),
        (["msync"], "EINVAL"),
        (["lseek"], "ESPIPE"),
        (["ioctl"], "ENOTTY"),
        (["exec_map"], "EPERM"),
        (["fallocate", 0, 0, PAGE], "EOPNOTSUPP"),
        (["fallocate", 8, 0, PAGE], "EOPNOTSUPP"),
        (["fallocate", 3, 0, 0], "EINVAL"),
        (["fallocate", 3, -PAGE, PAGE], "EINVAL"),
        (["direct_write"], "EINVAL"),
        (["write", "onto a hole"], "EINVAL"),
    ],
    ids=str,
)
def test_system_calls_answer_as_listed(
    world: World, call: list[Any], answer: str
) -> None:
    client = world.client(world.add())
    assert client.call(*call) == answer
    assert client.call("fstat")["st_size"] == 64 * PAGE


def test_punch_hole_through_the_file_frees_and_zeroes(world: World) -> None:
    path = world.add()
    one, two = world.client(path), world.client(path)
    one.ask("fill", args=[0, 4 * PAGE, "old"])
    assert two.ask("load", args=[PAGE, 3]) == "old"
    assert one.call("fallocate", 3, PAGE, 2 * PAGE) == 0
    assert one.call("fstat")["st_blocks"] == 2 * 8
    assert two.ask("load", args=[PAGE, 3]) == "\0\0\0"
    assert two.ask("load", args=[3 * PAGE, 3]) == "old"


def test_write_2_to_a_present_page_is_a_listed_deviation(world: World) -> None:
    client = world.client(world.add())
    client.ask("store", args=[0, "old text"])
    assert client.call("write", "new") == 3
    assert client.ask("load", args=[0, 8]) == "new text"


def test_open_files_are_counted_until_the_last_mapping_goes(world: World) -> None:
    path = world.add()
    one, two = world.client(path), world.client(path)
    assert world.server.ask("counts") == {"1.HOST": 2}
    one.ask("fill", args=[0, 64 * PAGE, "x"])
    # The session opens the view for itself to write back in bulk: not counted.
    revoke(world, 0, 64)
    assert world.server.ask("counts") == {"1.HOST": 2}
    one.end()
    two.end()
    wait_for(lambda: world.server.ask("counts") == {"1.HOST": 0})


# Who may have the guest view


def guest_client(world: World) -> Remote:
    set_state(world, 0, 64, PageState.OPEN, GUEST)
    set_state(world, 0, 64, PageState.CLOSED)
    fd = world.server.ask("open_view", ino=1, view=GUEST)
    return world.client(fd)


def test_the_guest_view_reads_what_the_host_view_refuses(world: World) -> None:
    path = world.add()
    guest, host = guest_client(world), world.client(path)
    assert guest.ask("read", args=[0]) == "EFAULT"
    world.server.ask("attach", ino=1, pgoff=0)
    world.server.ask("put", ino=1, pgoff=0, text="private")
    assert guest.ask("load", args=[0, 7]) == "private"
    assert host.ask("read", args=[0]) == "EFAULT"
    assert guest.call("fallocate", 3, 0, PAGE) == "EOPNOTSUPP"


def test_the_guest_view_has_no_name_and_cannot_be_opened_again(world: World) -> None:
    path = world.add()
    guest, host = guest_client(world), world.client(path)
    refusals = world.server.ask("try_guest_by_every_name", ino=1)
    assert refusals == ["ENOENT"] * 3
    assert [entry.name for entry in world.dir.iterdir()] == ["inode-1"]
    fd, pid = guest.ask("fds"), guest.process.pid
    assert host.call("reopen", pid, fd) == "EACCES"
    assert guest.call("reopen", pid, fd) == "EACCES"
    assert host.call("reopen", host.process.pid, host.ask("fds")) is None
    assert world.statistics()["opens_refused"] == 2
