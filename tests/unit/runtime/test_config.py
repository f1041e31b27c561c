"""Where values come from, and what cannot be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gmem.runtime.config import (
    DEFAULT_SHAPE,
    HostShape,
    NodeShape,
    ServiceConfig,
    parse_size,
)
from gmem.uapi.pages import SIZE_1G, SIZE_2M


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4K", 4096),
        ("2M", SIZE_2M),
        ("1G", SIZE_1G),
        ("1GiB", SIZE_1G),
        ("0", 0),
        (7, 7),
    ],
)
def test_a_size_is_what_people_write(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "G", "1X", "1.5G", "0x1000"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_defaults_lie_beside_each_other_in_the_run_directory(tmp_path: Path) -> None:
    config = ServiceConfig(service="guest_memfd", run_dir=tmp_path)
    assert config.name == "guest_memfd"
    assert config.listen == f"unix:{tmp_path}/guest_memfd.sock"
    assert config.host_allocator_target == f"unix:{tmp_path}/host_allocator.sock"


def test_flags_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vmm.json"
    path.write_text(json.dumps({"host": "a", "name": "a", "log_level": "debug"}))
    monkeypatch.setenv("GMEM_HOST", "b")
    monkeypatch.setenv("GMEM_NAME", "b")
    flags = ["--config", str(path), "--name", "vmm-1", "--run-dir", str(tmp_path)]
    config = ServiceConfig.load("vmm", flags)
    assert (config.name, config.host, config.log_level) == ("vmm-1", "b", "debug")
    assert config.listen == f"unix:{tmp_path}/vmm-1.sock"


@pytest.mark.parametrize(
    "flags",
    [
        ["--config", "/nowhere.json"],
        ["--host", "Not A Name"],
        ["--stop-seconds", "0"],
        ["--unknown", "1"],
    ],
)
def test_what_cannot_be_right_ends_with_a_sentence(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ServiceConfig.load("vmm", flags)
    assert "error: " in capsys.readouterr().err


def test_a_host_has_the_shape_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GMEM_HOST_SHAPE", raising=False)
    config = ServiceConfig(service="host_allocator", run_dir=tmp_path)
    assert HostShape.load(config) == DEFAULT_SHAPE
    shape = {"nodes": [{"memory_size": "8G", "huge_pages": {"1G": 2}}]}
    (tmp_path / "host.json").write_text(json.dumps(shape))
    node = NodeShape(memory_size=8 * SIZE_1G, huge_pages={SIZE_1G: 2})
    assert HostShape.load(config).nodes == (node,)
    shape["nodes"] *= 2
    monkeypatch.setenv("GMEM_HOST_SHAPE", json.dumps(shape))
    assert HostShape.load(config).nodes == (node, node)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"memory_size": "1G", "huge_pages": {"1G": 2}}, "exceed"),
        ({"memory_size": 5000}, "multiple of 4K"),
        ({"memory_size": 0}, "multiple of 4K"),
        ({"memory_size": "1G", "huge_pages": {"4K": 2}}, "no huge page size"),
    ],
)
def test_a_node_that_cannot_be_is_refused(node: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HostShape.model_validate({"nodes": [node]})
