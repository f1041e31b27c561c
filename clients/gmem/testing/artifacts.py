"""What is kept of a test that failed: the host's logs of that time, and its state."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from google.protobuf.json_format import MessageToDict

from gmem.testing.conformance.emulator import Emulator
from gmem.uapi.errors import KernelError, TransportError

TRACE: Final = "trace.txt"
STATE: Final = "state.json"
_NOT_IN_NAMES: Final = re.compile(r"[^\w.-]+")
_NAME_CHARS_MAX: Final = 150


@dataclass(frozen=True, slots=True)
class Marks:
    """How long each log of a host was when a test began."""

    kernel: Emulator
    lengths: Mapping[Path, int]

    @classmethod
    def of(cls, kernel: Emulator) -> Marks:
        """Take them now."""
        logs = (kernel.host.run_dir / "log").glob("*.jsonl")
        return cls(kernel, {log: log.stat().st_size for log in logs})

    def save(self, below: Path, test: str) -> Path:
        """Write logs, trace and state of a test into a directory of its own."""
        name = _NOT_IN_NAMES.sub("_", test)[-_NAME_CHARS_MAX:].strip("_")
        directory = below / name
        directory.mkdir(parents=True, exist_ok=True)
        lines: list[tuple[str, str]] = []
        for log in sorted((self.kernel.host.run_dir / "log").glob("*.jsonl")):
            text = log.read_bytes()[self.lengths.get(log, 0) :].decode(errors="replace")
            (directory / log.name).write_text(text)
            lines += [_traced(log.stem, line) for line in text.splitlines()]
        trace = [f"{when} {what}" for when, what in sorted(lines)]
        (directory / TRACE).write_text("\n".join(trace) + "\n")
        (directory / STATE).write_text(json.dumps(_state(self.kernel), indent=2))
        return directory


def _traced(service: str, line: str) -> tuple[str, str]:
    """Return when a line was written, and what it says in words."""
    try:
        fields = json.loads(line)
    except ValueError:
        return "", f"{service} {line}"
    when = str(fields.pop("timestamp", fields.pop("time", "")))
    event = fields.pop("event", "")
    method = fields.pop("method", "")
    for known in ("service", "host", "level"):
        fields.pop(known, None)
    rest = " ".join(f"{key}={value}" for key, value in fields.items())
    return when, " ".join(word for word in (service, method, event, rest) if word)


def _state(kernel: Emulator) -> dict[str, Any]:
    """Return inodes, VMs and statistics; what does not answer says so."""
    asked: dict[str, Callable[[], object]] = {
        "inodes": lambda: [
            MessageToDict(one) for one in kernel.files.list_guest_memfds()
        ],
        "vms": lambda: [MessageToDict(one) for one in kernel.vmm.list_vms()],
        "statistics": lambda: MessageToDict(kernel.allocator.get_statistics()),
    }
    state: dict[str, Any] = {}
    for name, ask in asked.items():
        try:
            state[name] = ask()
        except (KernelError, TransportError) as error:
            state[name] = str(error)
    return state
