"""Where a service listens, whom it asks, and what the emulated host has.

Values come, first to last, from command-line flags, the environment (GMEM_HOST,
GMEM_RUN_DIR, ...), a JSON file (`--config`), defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gmem.runtime.backend import Backend
from gmem.uapi.pages import HUGE_PAGE_SIZES, PAGE_SIZE, SIZE_1G, SIZE_2M

_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
SOCKET_PATH_MAX = 107


def parse_size(text: int | str) -> int:
    """Return the bytes in `4K`, `2M`, `1G`, `512MiB` or a plain number.

    ValueError names what was not understood.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes, 4K, 2M or 1G")
    return int(match[1]) << _SHIFTS[match[2].upper()]


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]


def default_run_dir() -> Path:
    """Return the directory of this user's emulated hosts."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/tmp/gmem-{os.getuid()}")  # noqa: S108 - named after its owner, made 0700
    return Path(runtime) / "gmem"


class ServiceConfig(BaseModel):
    """One service process of one emulated host."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    service: str
    """"host_allocator", "guest_memfd", "keeper", or "vmm"."""
    name: str = ""
    """The process, where a host has several of a kind ("vmm-0"); else the service."""
    host: str = Field(default="host0", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """The emulated host's name, as in its resource names."""
    run_dir: Path = Path()
    """Where sockets are; default: a directory of this user, named after the host."""
    listen: str = ""
    """`unix:PATH` or `HOST:PORT`; default: `unix:<run_dir>/<name>.sock`."""
    host_allocator_target: str = ""
    """gRPC target; default: the socket beside ours. So for the next."""
    guest_memfd_target: str = ""
    backend: Backend = Backend.FUSE
    """How guest_memfd serves views; the keeper must have been told the same."""
    log_level: str = "info"
    stop_seconds: float = Field(default=5.0, gt=0)
    """How long a stop waits for calls and operations in progress."""
    concurrent_rpcs_max: int = Field(default=1024, gt=0)
    """More at once are refused with RESOURCE_EXHAUSTED."""
    start_on_stdin: bool = False
    """Start when a line comes on stdin, ready but for that: others start meanwhile."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        filled = dict(values)
        filled["name"] = filled.get("name") or filled.get("service", "")
        host = str(filled.get("host") or "host0")
        if not filled.get("run_dir"):
            filled["run_dir"] = default_run_dir() / host
        run_dir = Path(filled["run_dir"]).absolute()
        for key, name in (
            ("listen", filled["name"]),
            ("host_allocator_target", "host_allocator"),
            ("guest_memfd_target", "guest_memfd"),
        ):
            filled[key] = filled.get(key) or f"unix:{run_dir / name}.sock"
        return filled

    @classmethod
    def load(cls, service: str, argv: Sequence[str] | None = None) -> ServiceConfig:
        """Read flags (`sys.argv` where `argv` is None), environment and file.

        SystemExit with a sentence on a flag, file or value that cannot be right.
        """
        parser = argparse.ArgumentParser(prog=f"python -m gmem.{service}")
        parser.add_argument("--config", type=Path, help="a JSON file with these names")
        for field in cls.model_fields:
            if field != "service":
                parser.add_argument(f"--{field.replace('_', '-')}", dest=field)
        flags = vars(parser.parse_args(argv))
        path: Path | None = flags.pop("config")
        try:
            values = {} if path is None else json.loads(path.read_text())
            values |= _environment(cls.model_fields)
            values |= {key: flag for key, flag in flags.items() if flag is not None}
            return cls(**values | {"service": service})
        except (OSError, ValueError) as error:
            parser.error(str(error))


def _environment(names: Iterable[str]) -> dict[str, str]:
    """Return what GMEM_HOST, GMEM_RUN_DIR, ... say."""
    variables = {name: f"GMEM_{name.upper()}" for name in names}
    return {
        name: os.environ[variable]
        for name, variable in variables.items()
        if variable in os.environ
    }


class NodeShape(BaseModel):
    """One NUMA node: its memory, and the pools made from it at boot."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_size: Size
    huge_pages: dict[Size, int] = Field(default_factory=dict)
    """Page size to nr_hugepages at boot."""

    @model_validator(mode="after")
    def _fits(self) -> NodeShape:
        for size in self.huge_pages:
            if size not in HUGE_PAGE_SIZES:
                raise ValueError(f"{size} is no huge page size; use 2M or 1G")
        if self.memory_size % PAGE_SIZE or not self.memory_size:
            raise ValueError(f"memory_size {self.memory_size} is no multiple of 4K")
        pooled = sum(size * number for size, number in self.huge_pages.items())
        if pooled > self.memory_size:
            raise ValueError(f"pools of {pooled} bytes exceed {self.memory_size}")
        return self


class HostShape(BaseModel):
    """What the emulated machine was booted with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nodes: tuple[NodeShape, ...] = Field(min_length=1)
    default_hugepagesize: Size = SIZE_2M
    """The size that /proc/meminfo's HugePages_* speak of (default_hugepagesz=)."""
    nr_overcommit_hugepages: dict[Size, int] = Field(default_factory=dict)
    optimize_vmemmap: bool = True
    """hugetlb_free_vmemmap= at boot."""
    gmem_in_place_conversion: bool = True
    """The module parameter of KVM: files of IN_PLACE are converted, not VMs."""

    @classmethod
    def load(cls, config: ServiceConfig) -> HostShape:
        """Read GMEM_HOST_SHAPE (JSON), or `<run_dir>/host.json`, or use DEFAULT_SHAPE.

        ValueError says what is wrong with them.
        """
        text = os.environ.get("GMEM_HOST_SHAPE")
        if text is not None:
            return cls.model_validate_json(text)
        path = config.run_dir / "host.json"
        if path.exists():
            return cls.model_validate_json(path.read_text())
        return DEFAULT_SHAPE


DEFAULT_SHAPE = HostShape(
    nodes=tuple(
        NodeShape(memory_size=16 * SIZE_1G, huge_pages={SIZE_1G: 4, SIZE_2M: 256})
        for _node in range(2)
    )
)
"""Two nodes of 16 GiB, each with four 1G and 256 2M pages."""
