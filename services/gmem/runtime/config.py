"""Where a service listens, whom it asks, and what the emulated host has.

Values come, first to last, from command-line flags, the environment (GMEM_HOST,
GMEM_RUN_DIR, ...), a JSON file (`--config`), defaults. Whatever cannot be right is a
ValueError whose sentence names it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from gmem.runtime.backend import Backend
from gmem.uapi.pages import HUGE_PAGE_SIZES, PAGE_SIZE, SIZE_1G, SIZE_2M

_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_HOST = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_FLAGS = {"1": True, "true": True, "0": False, "false": False}
_NOT_GIVEN: Final = Path()
SOCKET_PATH_MAX = 107

T = TypeVar("T")


def parse_size(text: int | str) -> int:
    """Return the bytes in `4K`, `2M`, `1G`, `512MiB` or a plain number.

    ValueError names what was not understood.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes, 4K, 2M or 1G")
    return int(match[1]) << _SHIFTS[match[2].upper()]


def default_run_dir() -> Path:
    """Return the directory of this user's emulated hosts."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/tmp/gmem-{os.getuid()}")  # noqa: S108 - named after its owner, made 0700
    return Path(runtime) / "gmem"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """One service process of one emulated host."""

    service: str
    """"host_allocator", "guest_memfd", "keeper", or "vmm"."""
    name: str = ""
    """The process, where a host has several of a kind ("vmm-0"); else the service."""
    host: str = "host0"
    """The emulated host's name, as in its resource names."""
    run_dir: Path = _NOT_GIVEN
    """Where sockets are; default: a directory of this user, named after the host."""
    listen: str = ""
    """`unix:PATH` or `HOST:PORT`; default: `unix:<run_dir>/<name>.sock`."""
    host_allocator_target: str = ""
    """gRPC target; default: the socket beside ours. So for the next."""
    guest_memfd_target: str = ""
    backend: Backend = Backend.FUSE
    """How guest_memfd serves views; the keeper must have been told the same."""
    log_level: str = "info"
    stop_seconds: float = 5.0
    """How long a stop waits for calls and operations in progress."""
    concurrent_rpcs_max: int = 1024
    """More at once are refused with RESOURCE_EXHAUSTED."""
    start_on_stdin: bool = False
    """Start when a line comes on stdin, ready but for that: others start meanwhile."""

    def __post_init__(self) -> None:
        """Fill in what was not given. ValueError for what cannot be right."""
        if _HOST.fullmatch(self.host) is None:
            raise ValueError(f"host: {self.host!r} is no name; use a-z, 0-9 and '-'")
        for name in ("stop_seconds", "concurrent_rpcs_max"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not more than 0")
        set_ = object.__setattr__
        set_(self, "name", self.name or self.service)
        if self.run_dir is _NOT_GIVEN:
            set_(self, "run_dir", default_run_dir() / self.host)
        for key, name in (
            ("listen", self.name),
            ("host_allocator_target", "host_allocator"),
            ("guest_memfd_target", "guest_memfd"),
        ):
            beside = f"unix:{self.run_dir.absolute() / name}.sock"
            set_(self, key, getattr(self, key) or beside)

    @classmethod
    def load(cls, service: str, argv: Sequence[str] | None = None) -> ServiceConfig:
        """Read flags (`sys.argv` where `argv` is None), environment and file.

        SystemExit with a sentence on a flag, file or value that cannot be right.
        """
        names = [each.name for each in fields(cls) if each.name != "service"]
        parser = argparse.ArgumentParser(prog=f"python -m gmem.{service}")
        parser.add_argument("--config", type=Path, help="a JSON file with these names")
        for name in names:
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name)
        flags = vars(parser.parse_args(argv))
        path: Path | None = flags.pop("config")
        try:
            values = {} if path is None else _known(path.read_text(), names)
            values |= _environment(names)
            values |= {key: flag for key, flag in flags.items() if flag is not None}
            read = {key: _read(key, value) for key, value in values.items()}
            return cls(service=service, **read)
        except (OSError, ValueError) as error:
            parser.error(str(error))


def _flag(value: object) -> bool:
    found = _FLAGS.get(str(value).lower())
    if found is None:
        raise ValueError(f"{value!r} is neither 1 nor 0")
    return found


def _number(value: object) -> int:
    if not str(value).isascii() or not str(value).isdigit():
        raise ValueError(f"{value!r} is no number; write 0 or more")
    return int(str(value))


def _backend(value: object) -> Backend:
    if value not in frozenset(Backend):
        raise ValueError(f"{value!r} is neither {' nor '.join(Backend)}")
    return Backend(str(value))


_READERS: Final[Mapping[str, Callable[[Any], object]]] = {
    "run_dir": Path,
    "backend": _backend,
    "stop_seconds": float,
    "concurrent_rpcs_max": _number,
    "start_on_stdin": _flag,
}


def _read(name: str, value: object) -> Any:
    try:
        return _READERS.get(name, str)(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _environment(names: Iterable[str]) -> dict[str, str]:
    """Return what GMEM_HOST, GMEM_RUN_DIR, ... say."""
    variables = {name: f"GMEM_{name.upper()}" for name in names}
    return {
        name: os.environ[variable]
        for name, variable in variables.items()
        if variable in os.environ
    }


def _known(text: object, names: Iterable[str]) -> dict[str, Any]:
    """Return an object of JSON, text or read already; it has no names but `names`."""
    values = _json(json.loads(text) if isinstance(text, str) else text, dict)
    if unknown := sorted(values.keys() - set(names)):
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(names)}")
    return dict(values)


def _json(value: object, kind: type[T]) -> T:
    """Return a value that has to be a list, or an object, of JSON."""
    if not isinstance(value, kind):
        word = "list" if kind is list else "object of names and values"
        raise ValueError(f"{value!r:.80} is no {word}")  # noqa: TRY004 - what a file says
    return value


def _pages_by_size(values: object) -> dict[int, int]:
    """Return numbers of pages by page size, of an object of JSON."""
    pages = _json(values, dict).items()
    return {parse_size(size): _number(number) for size, number in pages}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeShape:
    """One NUMA node: its memory in bytes, and the pools made from it at boot."""

    memory_size: int
    huge_pages: dict[int, int] = field(default_factory=dict)
    """Page size to nr_hugepages at boot."""

    def __post_init__(self) -> None:
        """Assert that pages are of a size that there is, and fit. ValueError."""
        for size in self.huge_pages:
            if size not in HUGE_PAGE_SIZES:
                raise ValueError(f"{size} is no huge page size; use 2M or 1G")
        if self.memory_size % PAGE_SIZE or self.memory_size <= 0:
            raise ValueError(f"memory_size {self.memory_size} is no multiple of 4K")
        pooled = sum(size * number for size, number in self.huge_pages.items())
        if pooled > self.memory_size:
            raise ValueError(f"pools of {pooled} bytes exceed {self.memory_size}")

    @classmethod
    def of(cls, values: object) -> NodeShape:
        """Return the node that an object of JSON describes. ValueError."""
        known = _known(values, [each.name for each in fields(cls)])
        return cls(
            memory_size=parse_size(known.get("memory_size", 0)),
            huge_pages=_pages_by_size(known.get("huge_pages", {})),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostShape:
    """What the emulated machine was booted with."""

    nodes: tuple[NodeShape, ...]
    default_hugepagesize: int = SIZE_2M
    """The size that /proc/meminfo's HugePages_* speak of (default_hugepagesz=)."""
    nr_overcommit_hugepages: dict[int, int] = field(default_factory=dict)
    optimize_vmemmap: bool = True
    """hugetlb_free_vmemmap= at boot."""
    gmem_in_place_conversion: bool = True
    """The module parameter of KVM: files of IN_PLACE are converted, not VMs."""

    def __post_init__(self) -> None:
        """ValueError for a host without memory."""
        if not self.nodes:
            raise ValueError("a host has one node or more")

    def to_json(self) -> str:
        """Return what `of` reads."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def of(cls, text: object) -> HostShape:
        """Return the shape that an object of JSON describes. ValueError."""
        values = _known(text, [each.name for each in fields(cls)])
        nodes = _json(values.pop("nodes", []), list)
        read = {name: _OF_A_SHAPE[name](value) for name, value in values.items()}
        return cls(nodes=tuple(map(NodeShape.of, nodes)), **read)

    @classmethod
    def load(cls, config: ServiceConfig) -> HostShape:
        """Read GMEM_HOST_SHAPE (JSON), or `<run_dir>/host.json`, or use DEFAULT_SHAPE.

        ValueError says what is wrong with them.
        """
        text = os.environ.get("GMEM_HOST_SHAPE")
        if text is not None:
            return cls.of(text)
        path = config.run_dir / "host.json"
        if path.exists():
            return cls.of(path.read_text())
        return DEFAULT_SHAPE


_OF_A_SHAPE: Final[Mapping[str, Callable[[Any], Any]]] = {
    "default_hugepagesize": parse_size,
    "nr_overcommit_hugepages": _pages_by_size,
    "optimize_vmemmap": _flag,
    "gmem_in_place_conversion": _flag,
}
DEFAULT_SHAPE = HostShape(
    nodes=tuple(
        NodeShape(memory_size=16 * SIZE_1G, huge_pages={SIZE_1G: 4, SIZE_2M: 256})
        for _node in range(2)
    )
)
"""Two nodes of 16 GiB, each with four 1G and 256 2M pages."""
