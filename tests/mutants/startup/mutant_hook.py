"""Has one module be loaded from mutated text: nothing else of the process is touched.

It stands alone, imports nothing of ours and is fast: every process that a test starts
runs it, services included, when MUTANT_OF_A_TEST names a file (see sitecustomize).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType

VARIABLE = "MUTANT_OF_A_TEST"
"""A JSON file: the `module`, its `path`, and what of it becomes what."""
NOT_APPLICABLE = 97
"""The exit status of a process whose mutant cannot be applied."""


class Loader(SourceLoader):
    """Loads one module from mutated text."""

    def __init__(self, path: Path, old: str, new: str) -> None:
        self._path = path
        self._old = old
        self._new = new

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_data(self, path: str | bytes) -> bytes:
        return mutated(self._path, self._old, self._new).encode()

    def path_stats(self, path: str) -> dict[str, int]:
        # No cache of compiled code: it would outlive the mutant.
        raise OSError(path)


class Finder(MetaPathFinder):
    """Finds the mutated module before anybody else does."""

    def __init__(self, module: str, loader: Loader) -> None:
        self._module = module
        self._loader = loader

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        return spec_from_loader(fullname, self._loader)


def mutated(path: Path, old: str, new: str) -> str:
    """Return the text of a file in which `old`, which is there once, is `new`."""
    text = path.read_text()
    found = text.count(old)
    if found != 1:
        raise LookupError(f"{old!r} stands {found} times in {path}")
    return text.replace(old, new)


def install(module: str, path: Path, old: str, new: str) -> None:
    """Have this process import the mutant instead of the module; before the cores."""
    assert module not in sys.modules, module
    mutated(path, old, new)
    sys.meta_path.insert(0, Finder(module, Loader(path, old, new)))


def install_from_environment() -> None:
    """Install what MUTANT_OF_A_TEST names, if it does; else end the process."""
    described = os.environ.get(VARIABLE)
    if not described:
        return
    try:
        mutant = json.loads(Path(described).read_text())
        install(mutant["module"], Path(mutant["path"]), mutant["old"], mutant["new"])
    except Exception as error:  # noqa: BLE001 - `site` would print it and go on
        print(f"mutant {described}: {error}", file=sys.stderr, flush=True)
        os._exit(NOT_APPLICABLE)
