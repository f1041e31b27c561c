"""The commands `inode ...`: guest_memfd inodes, and the bytes of their shared pages."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import mmap
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated

import typer

from gmem.client.guest_memfd import Bytes
from gmem.ctl import inspection
from gmem.ctl.arguments import Host, Json, RunDir, state_of
from gmem.ctl.errors import EPILOG, ControlError
from gmem.ctl.options import parse_place
from gmem.ctl.output import console, print_json, reporting
from gmem.ctl.state import HostState
from gmem.uapi.pages import format_size

inode_app = typer.Typer(help="guest_memfd inodes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Inode number, or its resource name.")]
Offset = Annotated[str, typer.Argument(help="Bytes: 4096, 0x1000 or 4K.")]


@inode_app.command("list", epilog=EPILOG)
def inode_list(
    host: Host = "local", run_dir: RunDir = None, as_json: Json = False
) -> None:
    """List the guest_memfd inodes of a host."""
    with reporting(as_json):
        inodes = asyncio.run(inspection.inodes(state_of(run_dir, host)))
        if as_json:
            print_json({"inodes": [inspection.message_values(i) for i in inodes]})
        else:
            inspection.print_inodes(inodes)


@inode_app.command("show", epilog=EPILOG)
def inode_show(
    name: Name,
    host: Host = "local",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Show one inode: folios, who may fault what, who holds what."""
    with reporting(as_json):
        state = state_of(run_dir, host)
        full_name = inspection.inode_name(state.host, name)
        inode = asyncio.run(inspection.inode(state, full_name))
        if as_json:
            print_json(inspection.message_values(inode))
        else:
            inspection.print_inode(inode)


@inode_app.command("read", epilog=EPILOG)
def inode_read(
    name: Name,
    offset: Offset,
    size: Annotated[str, typer.Argument(help="Bytes, as OFFSET.")],
    *,
    host: Host = "local",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Write bytes of shared pages to standard output as they are (--json: base64)."""
    with reporting(as_json):
        start, length = parse_place(offset), parse_place(size)
        if sys.stdout.isatty() and not as_json:
            raise ControlError("these are raw bytes: send them to a file or a pipe")
        state = state_of(run_dir, host)
        full_name = inspection.inode_name(state.host, name)
        if as_json:
            data = b"".join(asyncio.run(_read(state, full_name, start, length)))
            text = base64.b64encode(data).decode()
            print_json({"name": full_name, "offset": start, "base64": text})
        else:
            asyncio.run(_copy_out(state, full_name, start, length))


@inode_app.command("write", epilog=EPILOG)
def inode_write(
    name: Name,
    offset: Offset,
    source: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Default: standard input."),
    ] = None,
    *,
    host: Host = "local",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Write the bytes of a file into shared pages."""
    with reporting(as_json):
        start = parse_place(offset)
        state = state_of(run_dir, host)
        full_name = inspection.inode_name(state.host, name)
        with _bytes_of(source) as data:
            size = len(data)
            asyncio.run(_write(state, full_name, start, data))
        if as_json:
            print_json({"name": full_name, "offset": start, "stored": size})
        else:
            console().print(f"{full_name}: {format_size(size)} written at {start:#x}")


async def _read(state: HostState, name: str, offset: int, size: int) -> list[bytes]:
    async with inspection.guest_memfd(state) as client:
        stream = client.read_range(name=name, offset=offset, size=size)
        async with aclosing(stream) as chunks:
            return [chunk async for chunk in chunks]


async def _copy_out(state: HostState, name: str, offset: int, size: int) -> None:
    async with inspection.guest_memfd(state) as client:
        stream = client.read_range(name=name, offset=offset, size=size)
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


async def _write(state: HostState, name: str, offset: int, data: Bytes) -> None:
    async with inspection.guest_memfd(state) as client:
        await client.write_range(name=name, offset=offset, data=data)


@contextlib.contextmanager
def _bytes_of(source: Path | None) -> Iterator[Bytes]:
    """Have the bytes of a file, mapped where that can be. Raises ControlError."""
    if source is None:
        yield sys.stdin.buffer.read()
        return
    try:
        with source.open("rb") as file:
            if not source.is_file() or not source.stat().st_size:
                yield file.read()
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                yield mapped
    except OSError as error:
        raise ControlError(f"{source} cannot be read: {error.strerror}") from error
