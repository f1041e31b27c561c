"""A known mistake: text of a shipped module that is replaced when it is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.mutants.startup import mutant_hook
from tests.support.sources import REPOSITORY

SITE: Final = REPOSITORY / "tests" / "mutants" / "startup"
_ROOTS: Final = ("services", "clients", ".")


@dataclass(frozen=True, slots=True)
class Mutant:
    """In module `module`, the text `old` (which is there once) becomes `new`.

    `caught_by` is the id of a test that fails with it and passes without, run with
    `options`.
    """

    module: str
    old: str
    new: str
    caught_by: str
    options: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file of the module."""
        parts = self.module.split(".")
        files = [
            REPOSITORY.joinpath(root, *parts).with_suffix(".py") for root in _ROOTS
        ]
        return next(path for path in files if path.exists())

    @property
    def source(self) -> str:
        """The mutated text; LookupError where the mutation no longer applies."""
        return mutant_hook.mutated(self.path, self.old, self.new)

    def install(self) -> None:
        """Mutate this process, before it imports the cores."""
        mutant_hook.install(self.module, self.path, self.old, self.new)

    def describe(self, path: Path) -> None:
        """Write what MUTANT_OF_A_TEST is to name."""
        described = {
            "module": self.module,
            "path": str(self.path),
            "old": self.old,
            "new": self.new,
        }
        path.write_text(json.dumps(described))
