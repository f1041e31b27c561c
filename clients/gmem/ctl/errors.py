"""How gmemctl ends: exit statuses, and errors that are one sentence."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit statuses of every command; 2 is also what a wrong command line ends with."""

    DONE = 0
    """What was asked for is so."""
    REFUSED = 1
    """The emulated host said no, or a check of the demo did not hold."""
    USAGE = 2
    """The command line, or the machine, does not allow it."""
    UNREACHABLE = 3
    """A service is not there, died, or does not answer."""


EPILOG = (
    "Exit status: 0 done; 1 refused by the emulated host, or a check did not hold; "
    "2 wrong use; 3 a service is not there, died or does not answer."
)


class ControlError(Exception):
    """An expected error: one sentence that names the value and the way out."""

    def __init__(self, sentence: str, status: ExitStatus = ExitStatus.USAGE) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.status = status


class ServiceDiedError(ControlError):
    """A service of the host ended, or its connection did, while it was needed."""

    def __init__(self, sentence: str, *, service: str, pid: int | None = None) -> None:
        super().__init__(sentence, ExitStatus.UNREACHABLE)
        self.service = service
        self.pid = pid
