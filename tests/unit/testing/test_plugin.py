"""The plugin costs a run that does not use it next to nothing."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys


def test_importing_the_plugin_imports_nothing_big() -> None:
    text = (
        "import sys, gmem.testing.plugin; "
        "print([n for n in ('grpc', 'google.protobuf', 'numpy', 'pydantic', 'asyncio')"
        " if n in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_pytest_finds_it_by_its_entry_point() -> None:
    (point,) = importlib.metadata.entry_points(group="pytest11", name="gmem")
    assert point.value == "gmem.testing.plugin"


def test_pytest_is_an_extra_of_the_distribution() -> None:
    required = importlib.metadata.requires("gmem-emulator") or []
    (pytest,) = [text for text in required if text.startswith("pytest")]
    assert 'extra == "testing"' in pytest.replace("'", '"')
