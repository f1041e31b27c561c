"""The tree is shaped so that the namespace, the wheel and the layers can work."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.sources import REPOSITORY, shown

ROOTS = ("protos", "services", "clients")


def test_gmem_is_a_namespace_of_three_roots() -> None:
    for root in ROOTS:
        assert (REPOSITORY / root / "gmem").is_dir()
        assert not (REPOSITORY / root / "gmem" / "__init__.py").exists()


def test_generated_packages_are_namespaces_too() -> None:
    assert [shown(p) for p in (REPOSITORY / "protos").rglob("__init__.py")] == []


@pytest.mark.parametrize("root", ["services", "clients"])
def test_every_package_has_an_init(root: str) -> None:
    top = REPOSITORY / root / "gmem"
    directories = {path.parent for path in top.rglob("*.py")} - {top}
    assert directories
    missing = [shown(d) for d in directories if not (d / "__init__.py").exists()]
    assert sorted(missing) == []


def test_one_marker_says_that_gmem_is_typed() -> None:
    found = [shown(path) for root in ROOTS for path in _typed(root)]
    assert found == ["services/gmem/py.typed"]


def _typed(root: str) -> list[Path]:
    return list((REPOSITORY / root).rglob("py.typed"))


def test_every_layer_of_a_module_is_named_in_the_contract() -> None:
    """A new package must be given its place before anything may import it."""
    contract = (REPOSITORY / "pyproject.toml").read_text()
    top = {
        path.stem
        for root in ROOTS
        for path in (REPOSITORY / root / "gmem").iterdir()
        if path.suffix in {"", ".py"} and not path.name.startswith(("_", "."))
    }
    assert sorted(n for n in top if f"gmem.{n}" not in contract) == []


def test_the_wheel_merges_the_three_roots(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(REPOSITORY)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, cwd=tmp_path)
    [wheel] = tmp_path.glob("gmem_emulator-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        str(path.relative_to(REPOSITORY / root))
        for root in ROOTS
        for path in (REPOSITORY / root / "gmem").rglob("*.py")
    }
    assert wanted <= names
    assert "gmem/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "gmem",
        "gmem_emulator",
    }
