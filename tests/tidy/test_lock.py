"""The lock files pin, with hashes, what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.sources import REPOSITORY

PIN = re.compile(r"^([\w.-]+)==([\w.+!-]+)(.*)\n +--hash=sha256:", re.MULTILINE)


def pins(file_name: str) -> dict[str, str]:
    """The version of each package in one lock file; a pin without a hash fails."""
    text = (REPOSITORY / file_name).read_text()
    found = {str(canonicalize_name(m[1])): m[2] for m in PIN.finditer(text)}
    assert len(found) == len(re.findall(r"^\w", text, re.MULTILINE)), file_name
    return found


def wanted() -> dict[str, list[Requirement]]:
    """What each lock file must hold."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    runtime = [Requirement(text) for text in project["project"]["dependencies"]]
    tools = [Requirement(text) for text in project["dependency-groups"]["dev"]]
    return {"requirements.lock": runtime, "requirements-dev.lock": runtime + tools}


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_lock_satisfies_the_project(name: str) -> None:
    pinned = pins(name)
    for requirement in wanted()[name]:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"run `make lock`: {requirement} is missing"
        assert requirement.specifier.contains(version), (
            f"run `make lock`: {requirement}"
        )


def test_tests_run_with_the_versions_that_users_get() -> None:
    runtime, everything = pins("requirements.lock"), pins("requirements-dev.lock")
    assert {name: everything.get(name) for name in runtime} == runtime


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_lock_names_no_index(name: str) -> None:
    assert "://" not in (REPOSITORY / name).read_text()
