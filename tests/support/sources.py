"""Which files of the repository are ours: written by a person, not generated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Never committed (.gitignore), or not text of ours.
NOT_OURS = {".git", ".venv", "build", "dist", "__pycache__", ".pytest_cache"}
NOT_OURS |= {".hypothesis", ".mypy_cache", ".ruff_cache", ".import_linter_cache"}


def is_generated(path: Path) -> bool:
    """Whether protos/generate.py writes it."""
    return path.stem.endswith(("_pb2", "_pb2_grpc"))


def text_files() -> Iterator[tuple[Path, str]]:
    """Every file of ours that is text, with its text, in the order of their paths."""
    for directory, subdirectories, names in os.walk(REPOSITORY):
        subdirectories[:] = sorted(set(subdirectories) - NOT_OURS)
        # In a worktree .git is a file.
        for name in sorted(set(names) - NOT_OURS):
            path = Path(directory) / name
            if is_generated(path) or path.is_symlink():
                continue
            try:
                yield path, path.read_text()
            except UnicodeDecodeError:
                continue  # A picture or a binary golden file has no words.


def python_files(*roots: str) -> list[Path]:
    """The Python files of ours below `roots` (relative to the repository), sorted."""
    found = (path for root in roots for path in (REPOSITORY / root).rglob("*.py"))
    return sorted(path for path in found if not is_generated(path))


def shown(path: Path) -> str:
    """Return `path` as a person would type it at the top of the repository."""
    return str(path.relative_to(REPOSITORY))
