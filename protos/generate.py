"""The Python stubs beside the .proto files, and one way to make them.

``python protos/generate.py`` rewrites every stub in place and removes those
whose .proto is gone; ``--out DIR`` writes the same tree elsewhere, which is how
tests/tidy compares. ``descriptors()`` gives the compiled files with their
comments to whoever checks the contract.
"""

from __future__ import annotations

import argparse
import importlib.resources
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parent
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")
_SERVICE = re.compile(r"^service ", re.MULTILINE)


def proto_files() -> list[str]:
    """Our .proto files, relative to ``protos/``, sorted."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("gmem/**/*.proto"))


def stub_files(root: Path) -> list[Path]:
    """The generated files below ``root``, relative to it, sorted."""
    found = (
        path for pattern in STUB_PATTERNS for path in root.glob(f"gmem/**/{pattern}")
    )
    return sorted({path.relative_to(root) for path in found})


def generate(out: Path) -> None:
    """Write all stubs below ``out``; RuntimeError with protoc's words if it refuses."""
    out.mkdir(parents=True, exist_ok=True)
    _protoc(
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
    )
    for name in proto_files():
        if not _SERVICE.search((ROOT / name).read_text()):
            # protoc writes an empty module of services where there is none.
            for suffix in ("_pb2_grpc.py", "_pb2_grpc.pyi"):
                (out / name.replace(".proto", suffix)).unlink(missing_ok=True)


def descriptors() -> FileDescriptorSet:
    """Our files compiled, each with its source comments."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "gmem.binpb"
        _protoc(f"--descriptor_set_out={path}", "--include_source_info")
        return FileDescriptorSet.FromString(path.read_bytes())


def _protoc(*arguments: str) -> None:
    """Run protoc inside ``protos/``, so that paths are package names."""
    files = proto_files()
    if not files:
        message = f"no .proto file below {ROOT / 'gmem'}"
        raise RuntimeError(message)
    includes = [f"-I{path}" for path in (".", *_includes())]
    command = [sys.executable, "-m", "grpc_tools.protoc", *includes]
    # The mypy plugins are scripts beside this interpreter, on PATH or not.
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*command, *arguments, *files],
        cwd=ROOT,
        env=os.environ | {"PATH": scripts},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        message = f"protoc failed:\n{done.stderr}"
        raise RuntimeError(message)


def _includes() -> Iterator[str]:
    """Where google/protobuf and google/rpc are installed."""
    yield str(importlib.resources.files("grpc_tools") / "_proto")
    # googleapis-common-protos: `google` is a namespace, `google.rpc` a package.
    yield str(Path(str(importlib.resources.files("google.rpc"))).parent.parent)


def _remove_stale(written: set[Path]) -> None:
    """Delete stubs beside the .proto files that nothing generates any more."""
    for stub in stub_files(ROOT):
        if stub not in written:
            (ROOT / stub).unlink()
            print(f"removed {stub}")


def main() -> None:
    """Generate in place, or below ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT, help="default: beside them")
    out: Path = parser.parse_args().out.resolve()
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        written = stub_files(Path(directory))
        for stub in written:
            target = out / stub
            target.parent.mkdir(parents=True, exist_ok=True)
            content = (Path(directory) / stub).read_bytes()
            if not target.exists() or target.read_bytes() != content:
                target.write_bytes(content)
                print(f"wrote {stub}")
    if out == ROOT:
        _remove_stale(set(written))


if __name__ == "__main__":
    main()
