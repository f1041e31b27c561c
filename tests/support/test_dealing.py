"""Tests that share a host go to one worker, and no others."""

from __future__ import annotations

import pytest

from tests.support.dealing import scope_of


@pytest.mark.parametrize(
    ("name", "apart_by"),
    [
        ("test_a_page", ""),
        ("test_a_page[2M]", ""),
        ("test_a_page[memfd]", " memfd"),
        ("test_a_page[fuse-GetPfn-x=[1]]", " fuse"),
        ("test_a_page[wire-fuse]", ""),
        ("test_converges[RFC_V2]", " RFC_V2"),
        ("TestHistories::runTest", ""),
    ],
)
def test_a_module_is_apart_by_backend_and_lineage(name: str, apart_by: str) -> None:
    assert scope_of(f"tests/x.py::{name}") == f"tests/x.py{apart_by}"
