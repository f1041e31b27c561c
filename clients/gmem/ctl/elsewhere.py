"""A host that somebody else runs, e.g. in containers: only its targets are known.

GMEM_TARGETS names them, `NAME=TARGET` with blanks between, as in

    GMEM_TARGETS="host_allocator=host_allocator:50051 vmm-0=vmm-0:50051"

and GMEM_HOST the host, as its services are told. gmemctl then asks those services,
looks at no run directory, and starts and ends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gmem.ctl import options
from gmem.ctl.errors import ControlError
from gmem.ctl.state import HostState, ServiceRecord

TARGETS_VARIABLE: Final = "GMEM_TARGETS"
HOST_VARIABLE: Final = "GMEM_HOST"
DEFAULT_HOST: Final = "host0"
"""What services call their host where nobody tells them."""


def host_elsewhere(
    environ: Mapping[str, str], host: str | None = None
) -> HostState | None:
    """Return the host that GMEM_TARGETS describes; None without the variable.

    Raises ControlError for what is no list of targets, and where `host` is asked for
    and it is another one.
    """
    text = environ.get(TARGETS_VARIABLE, "")
    if not text.strip():
        return None
    name = options.parse_host(environ.get(HOST_VARIABLE) or DEFAULT_HOST)
    if host not in {None, name}:
        raise ControlError(
            f"{TARGETS_VARIABLE} describes host {name}, not {host}: "
            f"say --host {name}, or unset the variable"
        )
    services = tuple(_service(word) for word in text.split())
    return HostState(name, "", "", services, backend="")


def _service(word: str) -> ServiceRecord:
    name, _, target = word.partition("=")
    if not name or not target:
        raise ControlError(
            f"{word!r} in {TARGETS_VARIABLE} is no target: "
            "write vmm-0=unix:/run/gmem/vmm-0.sock or vmm-0=HOST:PORT"
        )
    return ServiceRecord(name, 0, 0, target)
