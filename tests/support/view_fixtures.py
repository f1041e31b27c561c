"""Fixtures for worlds of views: a keeper, a server and clients, under the watchdog."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmem.testing.watchdog import FuseWatchdog
from tests.support.view_world import MakeWorld, World


@pytest.fixture
def make_world(tmp_path: Path, fuse_watchdog: FuseWatchdog) -> Iterator[MakeWorld]:
    """Make worlds; each is ended with the test, and its connection is bounded."""
    worlds: list[World] = []

    def make(**options: Any) -> World:
        root = tmp_path / f"w{len(worlds)}"
        root.mkdir()
        world = World(root, **options)
        worlds.append(world)
        fuse_watchdog.watch(world.connection)
        return world

    yield make
    for world in worlds:
        world.end()
        fuse_watchdog.release(world.connection)


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    """A world as most tests want it."""
    return make_world()
