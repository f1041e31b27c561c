"""The table above each rpc names causes that exist, with the status they really get."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from gmem.uapi.errors import ERROR_TABLE, Reason
from tests.support.sources import REPOSITORY

HEADER = ["condition", "reason", "status", "recovery"]
# Field numbers of FileDescriptorProto.service and ServiceDescriptorProto.method.
SERVICE, METHOD = 6, 2


@dataclass(frozen=True)
class Rpc:
    """One rpc, its comment, and whether its request carries a request_id."""

    name: str
    comment: str
    mutates: bool

    def table(self) -> list[list[str]]:
        """The rows of the table in the comment, header first, rule left out."""
        rows = [line.strip() for line in self.comment.splitlines()]
        cells = [row.strip("|").split("|") for row in rows if row.startswith("|")]
        stripped = [[cell.strip() for cell in row] for row in cells]
        return [row for row in stripped if not re.fullmatch(r"[-:]*", "".join(row))]


@functools.cache
def rpcs() -> dict[str, Rpc]:
    compiled = _descriptors()
    return {rpc.name: rpc for file in compiled.file for rpc in _rpcs_of(file)}


def _descriptors() -> FileDescriptorSet:
    path = REPOSITORY / "protos" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    compiled = module.descriptors()
    assert isinstance(compiled, FileDescriptorSet)
    return compiled


def _rpcs_of(file: FileDescriptorProto) -> Iterator[Rpc]:
    comments = {
        tuple(location.path): location.leading_comments
        for location in file.source_code_info.location
    }
    fields = {
        f".{file.package}.{message.name}": {field.name for field in message.field}
        for message in file.message_type
    }
    for i, service in enumerate(file.service):
        for j, method in enumerate(service.method):
            yield Rpc(
                name=f"{service.name}.{method.name}",
                comment=comments.get((SERVICE, i, METHOD, j), ""),
                mutates="request_id" in fields[method.input_type],
            )


def rpc_names() -> list[str]:
    names = sorted(rpcs())
    assert names, "no rpc in protos"
    return names


@pytest.mark.parametrize("name", rpc_names())
def test_table_agrees_with_the_reasons(name: str) -> None:
    header, *rows = rpcs()[name].table() or [HEADER]
    assert header == HEADER
    for row in rows:
        assert len(row) == len(HEADER), row
        condition, reason, status, recovery = row
        assert condition, row
        assert reason in Reason.__members__, row
        assert status == ERROR_TABLE[Reason[reason]].status, row
        assert recovery, row


@pytest.mark.parametrize("name", rpc_names())
def test_every_mutation_says_what_may_be_refused(name: str) -> None:
    rpc = rpcs()[name]
    assert rpc.comment.strip(), f"{name} has no comment"
    if rpc.mutates:
        assert len(rpc.table()) > 1, f"{name} has a request_id and no table"


def test_some_rpc_mutates() -> None:
    assert any(rpc.mutates for rpc in rpcs().values())
