"""Whole hosts, as gmemctl starts them."""

from tests.support.host_fixtures import (
    allocator,
    backend,
    before,
    clean_host,
    gmem,
    host_shape,
    module_host,
    own_host,
)
from tests.support.ordinary_user import public_python, reachable_python
from tests.support.view_fixtures import make_world, world

__all__ = [
    "allocator",
    "backend",
    "before",
    "clean_host",
    "gmem",
    "host_shape",
    "make_world",
    "module_host",
    "own_host",
    "public_python",
    "reachable_python",
    "world",
]
