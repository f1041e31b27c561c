"""What commands print: tables for people, one JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import typer
from rich.console import Console, JustifyMethod
from rich.table import Table

from gmem.ctl.errors import ControlError, ExitStatus, ServiceDiedError
from gmem.uapi.errors import KernelError, TransportError

FILE_COLUMNS: Final = 160


def print_json(values: object) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


def console() -> Console:
    """Return a console on standard output; colours only on a terminal."""
    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen.width = FILE_COLUMNS  # A file has no width to fold at.
    return screen


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under a heading; numbers to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    body = [list(row) for row in rows]
    for index, column in enumerate(columns):
        numeric = body and all(isinstance(row[index], int) for row in body)
        side: JustifyMethod = "right" if numeric else "left"
        table.add_column(column, justify=side, overflow="fold")
    for row in body:
        table.add_row(*(str(cell) for cell in row))
    console().print(table)


def status_of(error: ControlError | KernelError | TransportError) -> ExitStatus:
    """Return the exit status that an expected error ends a command with."""
    if isinstance(error, ControlError):
        return error.status
    if isinstance(error, TransportError):
        return ExitStatus.UNREACHABLE
    return ExitStatus.REFUSED


def error_values(
    error: ControlError | KernelError | TransportError,
) -> dict[str, Any]:
    """Return an expected error as JSON values."""
    values: dict[str, Any] = {"sentence": str(error), "status": int(status_of(error))}
    if isinstance(error, KernelError):
        values |= {"reason": error.reason.value, "errno": error.errno}
        values |= {"numbers": dict(error.numbers)}
    elif isinstance(error, (TransportError, ServiceDiedError)):
        values["service"] = error.service
    return values


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """End the command with a sentence and a status where an expected error is raised.

    Anything else is a bug of ours and keeps its traceback.
    """
    try:
        yield
    except (ControlError, KernelError, TransportError) as error:
        if as_json:
            print_json({"error": error_values(error)})
        else:
            sys.stderr.write(f"gmemctl: {error}\n")
        raise typer.Exit(int(status_of(error))) from error
