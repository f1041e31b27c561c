"""What people write on the command line of gmemctl."""

from __future__ import annotations

import pytest

from gmem.ctl import options
from gmem.ctl.errors import ControlError
from gmem.ctl.options import PoolOption, host_shape, parse_pool
from gmem.uapi.pages import SIZE_1G, SIZE_2M


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16G", 16 << 30),
        ("512m", 512 << 20),
        ("4K", 4096),
        ("4096", 4096),
        ("1GiB", 1 << 30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert options.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1G", "1.5G", "G", "1P", "0x10", "16777216T"])
def test_a_size_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ControlError) as caught:
        options.parse_size(text)
    assert repr(text) in caught.value.sentence


@pytest.mark.parametrize("text", ["0", "4097", "1"])
def test_memory_is_whole_pages(text: str) -> None:
    with pytest.raises(ControlError, match=text):
        options.parse_memory(text)


@pytest.mark.parametrize(
    ("text", "pool"),
    [
        ("1G:6@0", PoolOption(SIZE_1G, 6, 0)),
        ("2M:512", PoolOption(SIZE_2M, 512)),
        ("1G:0@1", PoolOption(SIZE_1G, 0, 1)),
    ],
)
def test_pools(text: str, pool: PoolOption) -> None:
    assert parse_pool(text) == pool
    assert str(pool) == text


@pytest.mark.parametrize(
    "text", ["1G", "1G:", "1G:x", "1G:-1", "4K:1", "1G:1@", "1G:1@-1", "1G:1@a", "1G:²"]
)
def test_a_pool_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ControlError):
        parse_pool(text)


@pytest.mark.parametrize("text", ["", "a b", "A", "-a", "a-", "../x", "a/b", "x" * 33])
def test_a_host_name_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ControlError):
        options.parse_host(text)


def test_pools_without_a_node_are_spread_as_at_boot() -> None:
    pools = [parse_pool("1G:3"), parse_pool("2M:10@1"), parse_pool("1G:1@1")]
    shape = host_shape(2, 8 << 30, pools, SIZE_2M)
    assert [node.huge_pages for node in shape.nodes] == [
        {SIZE_1G: 2},
        {SIZE_1G: 2, SIZE_2M: 10},
    ]
    assert [node.memory_size for node in shape.nodes] == [8 << 30, 8 << 30]


def test_pools_larger_than_their_node_are_refused_with_the_way_out() -> None:
    with pytest.raises(ControlError) as caught:
        host_shape(2, 4 << 30, [parse_pool("1G:5@1")], SIZE_2M)
    assert "5G" in caught.value.sentence
    assert "node 1" in caught.value.sentence
    assert "--memory" in caught.value.sentence


def test_a_node_that_is_not_there_is_refused() -> None:
    with pytest.raises(ControlError, match=r"1G:1@2 names node 2.*0 to 1"):
        host_shape(2, 4 << 30, [parse_pool("1G:1@2")], SIZE_2M)


@pytest.mark.parametrize("on", [True, False])
def test_the_module_parameter_is_part_of_the_shape(on: bool) -> None:
    shape = options.host_shape(1, 1 << 30, [], 1 << 21, in_place_conversion=on)
    assert shape.gmem_in_place_conversion is on
    assert type(shape).model_validate_json(shape.model_dump_json()) == shape
