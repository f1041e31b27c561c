"""The parent's side of a demo program: start it, ask it, see how it ended."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from gmem.uapi.errors import Reason, TransportError, make_error

END_SECONDS_MAX: Final = 10.0
KILL_SECONDS_MAX: Final = 2.0
LINE_BYTES_MAX: Final = 1 << 20


class ChildEndedError(Exception):
    """A program ended instead of answering; `status` is negative for a signal."""

    def __init__(self, name: str, status: int | None) -> None:
        super().__init__(f"{name} {describe(status)}")
        self.name = name
        self.status = status


class Program(ABC):
    """A demo program that runs somewhere, and two streams of lines to it and back."""

    name: str
    where: str
    """How to tell it from others, for a person: `pid 17`."""
    known_as: str
    """What an error of guest_memfd says of it beside its name."""

    def __init__(
        self, requests: asyncio.StreamWriter, answers: asyncio.StreamReader
    ) -> None:
        self._requests = requests
        self._answers = answers

    @abstractmethod
    async def end(self) -> int | None:
        """Close its input and wait for its end.

        Returns the exit status, negative for a signal; None when it does not end.
        """

    async def ask(self, do: str, **arguments: int | str) -> dict[str, Any]:
        """Return the answer to one request.

        Raises the KernelError or TransportError that the program met, and
        ChildEndedError where it ended instead.
        """
        self._requests.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        try:
            line = await self._answers.readline()
        except ConnectionError:
            # What was written meets its end; a pipe says so by the end of its answers.
            line = b""
        if not line:
            raise ChildEndedError(self.name, await self.end())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise make_error(
                Reason(answer["error"]["reason"]),
                answer["error"]["sentence"],
                **answer["error"]["numbers"],
            )
        if "dead" in answer:
            raise TransportError(answer["dead"].pop("sentence"), **answer["dead"])
        result: dict[str, Any] = answer["ok"]
        return result


class Child(Program):
    """One demo program as a process of its own; its errors go to `log`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        super().__init__(process.stdin, process.stdout)
        self.name = name
        self.pid = process.pid
        self.where = self.known_as = f"pid {process.pid}"
        self._process = process

    @classmethod
    async def start(cls, name: str, environ: Mapping[str, str], log: Path) -> Self:
        """Start `python -m gmem.ctl.demo.<name>`."""
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                f"gmem.ctl.demo.{name}",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=LINE_BYTES_MAX,
                cwd="/",
                env=dict(environ),
            )
        return cls(name, process)

    async def end(self) -> int | None:
        """Close its input and wait; kill it where that does not help.

        Returns the exit status; None for one that sleeps in the kernel: it dies when
        the file it touches is served again, or its connection ends.
        """
        self._requests.close()
        for seconds in (END_SECONDS_MAX, KILL_SECONDS_MAX):
            try:
                return await asyncio.wait_for(self._process.wait(), seconds)
            except TimeoutError:
                if self._process.returncode is None:
                    self._process.kill()
        return None


def describe(status: int | None) -> str:
    """Say how a process ended, in words and numbers."""
    if status is None:
        return "sleeps in the kernel"
    if status < 0:
        return f"died by signal {-status} ({signal.Signals(-status).name})"
    return f"ended with exit status {status}"
