"""The committed stubs are what the .proto files say today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.sources import REPOSITORY

PROTOS = REPOSITORY / "protos"


def stubs(root: Path) -> dict[str, bytes]:
    found = (path for path in root.glob("gmem/**/*_pb2*") if path.suffix != ".pyc")
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_stubs_are_what_make_protos_writes(tmp_path: Path) -> None:
    command = [sys.executable, str(PROTOS / "generate.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    fresh, committed = stubs(tmp_path), stubs(PROTOS)

    assert fresh
    assert sorted(committed) == sorted(fresh), "run `make protos`"
    stale = [name for name, content in fresh.items() if committed[name] != content]
    assert stale == [], "run `make protos`"
