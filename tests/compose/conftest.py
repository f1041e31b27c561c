"""One image and one host in containers for all tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containers import Project, built_image, running_project
from tests.support.requirements import require_engine, require_fuse

# The first test of a run builds the image.
TEST_SECONDS_MAX = 500


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS_MAX))


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    require_engine()
    require_fuse()
    with built_image() as name:
        yield name


@pytest.fixture(scope="module")
def project(image: str) -> Iterator[Project]:
    """A host that the tests of a module share."""
    with running_project(image) as made:
        yield made
