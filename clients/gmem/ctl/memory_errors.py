"""The commands that give and take memory errors: of a page of an inode, of a frame."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Final, TypeVar

import typer

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as gm
from gmem.api.host_allocator.v1.host_allocator_pb2 import PoisonedFrame
from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.ctl import options
from gmem.ctl.arguments import Host, Json, RunDir, state_of
from gmem.ctl.errors import EPILOG, ControlError
from gmem.ctl.inspection import inode_name, message_values
from gmem.ctl.output import console, print_json, print_table, reporting
from gmem.ctl.state import HostState
from gmem.uapi.errors import Errno
from gmem.uapi.pages import format_size

T = TypeVar("T")

frame_app = typer.Typer(help="Memory errors of frames.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Inode number, or its resource name.")]
Offset = Annotated[str, typer.Argument(help="Of the page, in bytes: 0x3000, or 2M.")]
FrameNumber = Annotated[str, typer.Argument(help="Frame number, e.g. 0x40000.")]
_KILL_POLICIES: Final = {
    "lineage": gm.KILL_POLICY_UNSPECIFIED,
    "early": gm.KILL_POLICY_EARLY,
    "late": gm.KILL_POLICY_LATE,
}


def add_to(inode_app: typer.Typer) -> None:
    """Add what is done to a page of an inode to the commands `inode ...`."""
    inode_app.command("poison", epilog=EPILOG)(inode_poison)
    inode_app.command("unpoison", epilog=EPILOG)(inode_unpoison)


def parse_number(text: str) -> int:
    """Read `4096`, `0x3000` or `2M`. Raises ControlError."""
    try:
        return int(text, 0)
    except ValueError:
        return options.parse_size(text)


def inode_poison(
    name: Name,
    offset: Offset,
    *,
    kill_policy: Annotated[
        str,
        typer.Option(help="lineage; or early, late: with memory_failure() mended."),
    ] = "lineage",
    host: Host = "local",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Give a page of an inode a memory error: guest and host lose it."""
    with reporting(as_json):
        kill = _kill_policy(kill_policy)
        state = state_of(run_dir, host)
        full_name, at = inode_name(state.host, name), parse_number(offset)
        failure = _of_guest_memfd(
            state,
            lambda c: c.inject_memory_error(
                name=full_name, offset=at, kill_policy=kill
            ),
        )
        if as_json:
            print_json(message_values(failure))
        else:
            console().print(failure_text(full_name, failure), markup=False)


def inode_unpoison(
    name: Name,
    offset: Offset,
    host: Host = "local",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Forget the memory error of a page of an inode."""
    with reporting(as_json):
        state = state_of(run_dir, host)
        full_name, at = inode_name(state.host, name), parse_number(offset)
        pfn = _of_guest_memfd(
            state, lambda c: c.unpoison_memory(name=full_name, offset=at)
        )
        if as_json:
            print_json({"pfn": pfn})
        else:
            console().print(f"frame {pfn:#x} has no memory error any more")


@frame_app.command("poison", epilog=EPILOG)
def frame_poison(
    pfn: FrameNumber,
    host: Host = "local",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Give a frame a memory error, whoever has it."""
    _change(run_dir, host, as_json, lambda c: c.inject_memory_error(parse_number(pfn)))


@frame_app.command("unpoison", epilog=EPILOG)
def frame_unpoison(
    pfn: FrameNumber,
    host: Host = "local",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Forget the memory error of a frame; one that was withheld is free again."""
    _change(run_dir, host, as_json, lambda c: c.unpoison_memory(parse_number(pfn)))


@frame_app.command("errors", epilog=EPILOG)
def frame_errors(
    host: Host = "local", run_dir: RunDir = None, as_json: Json = False
) -> None:
    """List the frames with a memory error."""
    with reporting(as_json):
        state = state_of(run_dir, host)
        frames = _of_allocator(state, lambda c: c.list_memory_errors())
        if as_json:
            print_json({"frames": [message_values(frame) for frame in frames]})
        else:
            _print_frames(frames)


def failure_text(name: str, failure: gm.InjectMemoryErrorResponse) -> str:
    """Say what a memory error has taken."""
    result = Errno(failure.errno).name if failure.errno else "0"
    signalled = ", ".join(failure.signalled) or "nobody"
    return (
        f"frame {failure.pfn:#x} has a memory error: {name} lost "
        f"{format_size(failure.size)} at {failure.offset:#x}; memory_failure() is "
        f"{result}, SIGBUS goes to {signalled}"
    )


def _kill_policy(word: str) -> gm.KillPolicy.ValueType:
    if word not in _KILL_POLICIES:
        raise ControlError(
            f"{word!r} is no kill policy: use {', '.join(_KILL_POLICIES)}"
        )
    return _KILL_POLICIES[word]


def _change(
    run_dir: RunDir,
    host: str,
    as_json: bool,
    call: Callable[[HostAllocatorClient], Awaitable[PoisonedFrame]],
) -> None:
    with reporting(as_json):
        frame = _of_allocator(state_of(run_dir, host), call)
        if as_json:
            print_json(message_values(frame))
        else:
            _print_frames([frame])


def _print_frames(frames: list[PoisonedFrame]) -> None:
    rows = [
        (hex(frame.pfn), frame.nr_pages, frame.handle or "withheld") for frame in frames
    ]
    print_table(("PFN", "PAGES", "RESERVATION"), rows)


def _of_guest_memfd(
    state: HostState, call: Callable[[GuestMemfdClient], Awaitable[T]]
) -> T:
    async def ask() -> T:
        target = state.service("guest_memfd").target
        async with GuestMemfdClient(target, client="gmemctl") as client:
            return await call(client)

    return asyncio.run(ask())


def _of_allocator(
    state: HostState, call: Callable[[HostAllocatorClient], Awaitable[T]]
) -> T:
    async def ask() -> T:
        target = state.service("host_allocator").target
        async with HostAllocatorClient(target, client="gmemctl") as client:
            return await call(client)

    return asyncio.run(ask())
