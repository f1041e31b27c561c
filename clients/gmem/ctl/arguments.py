"""Options that all commands share, and the host that they name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from gmem.ctl import options
from gmem.ctl.directories import HostDirectory, base_directory
from gmem.ctl.elsewhere import host_elsewhere
from gmem.ctl.state import HostState, require_state
from gmem.runtime.backend import BACKEND_VARIABLE, Backend

ChosenBackend: TypeAlias = Annotated[
    Backend | None,
    typer.Option(
        envvar=BACKEND_VARIABLE,
        help="How views are served: fuse (a private page is SIGBUS; the default), or "
        "memfd (plain memfds, no root, no /dev/fuse: a private page is zeros).",
    ),
]
Repair: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--repair", help="Start the keeper of a running host again, nothing else."
    ),
]
Spare: TypeAlias = Annotated[
    bool,
    typer.Option(
        help="Have a successor of guest_memfd loaded beforehand: it takes 46 MB, and "
        "a crash is over in some tenths of a second, not in seconds."
    ),
]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="One JSON document, also for an error.")
]
Host: TypeAlias = Annotated[str, typer.Option("--host", help="The emulated host.")]
RunDir: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        help="Directory of all hosts; else GMEM_RUN_DIR, XDG_RUNTIME_DIR/gmem or "
        "/tmp/gmem-UID.",
    ),
]


def directory_of(run_dir: Path | None, host: str) -> HostDirectory:
    """Return where a host's files are. Raises ControlError for a name that is none."""
    return HostDirectory(base_directory(run_dir, os.environ), options.parse_host(host))


def state_of(run_dir: Path | None, host: str) -> HostState:
    """Return a host that is up, here or elsewhere. Raises ControlError."""
    directory = directory_of(run_dir, host)
    return host_elsewhere(os.environ, host) or require_state(directory)


Pools: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        help="Pages at boot, SIZE:PAGES or SIZE:PAGES@NODE; repeatable. "
        f"Default: {', '.join(options.DEFAULT_POOLS)}."
    ),
]
InPlaceConversion: TypeAlias = Annotated[
    bool,
    typer.Option(
        help="Files of IN_PLACE are converted by themselves; else only the attributes "
        "of their VMs change, as in MAINLINE."
    ),
]
