"""A refusal on the wire: KernelError to gRPC status with ErrorInfo, and back.

The Reason travels in `google.rpc.ErrorInfo` of the status details (domain
`gmem.emulator`); its metadata holds errno, lineage, and each number as a JSON value, so
that 3 and "3" stay apart. Clients decode from there alone: the status code is a hint
for generic tools, the text is free to improve. A status without our ErrorInfo did not
come from a core and is a TransportError.

A service that could not reach another says so in the same way, with the reason
`TRANSPORT` that no core can raise: its caller learns who is missing.
"""

from __future__ import annotations

import json

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from gmem.uapi.errors import (
    ERROR_TABLE,
    KernelError,
    Reason,
    TransportError,
    make_error,
)
from gmem.uapi.lineage import Lineage

DOMAIN = "gmem.emulator"
TRANSPORT = "TRANSPORT"
# gRPC gives trailing metadata 16 KiB at most, and the text travels twice in it.
SENTENCE_CHARS_MAX = 1024
STRING_CHARS_MAX = 2048

_DETAILS_KEY = "grpc-status-details-bin"
_RESERVED = ("errno", "lineage", "numbers")


def encode(error: KernelError | TransportError) -> grpc.Status:
    """Return the status that carries `error`; long texts are cut, with an ellipsis."""
    if isinstance(error, TransportError):
        metadata = {"service": error.service, "target": error.target}
        return _status(grpc.StatusCode.UNAVAILABLE, TRANSPORT, str(error), metadata)

    assert not set(error.numbers) & set(_RESERVED), error.numbers
    metadata = {key: _to_json(value) for key, value in error.numbers.items()}
    metadata["errno"] = str(error.errno)
    # A map of the wire has no order, the sentence's numbers have.
    metadata["numbers"] = ",".join(error.numbers)
    if error.lineage is not None:
        metadata["lineage"] = error.lineage.value
    code = grpc.StatusCode[ERROR_TABLE[error.reason].status]
    return _status(code, error.reason.value, error.sentence, metadata)


def decode(error: grpc.aio.AioRpcError) -> KernelError | TransportError | None:
    """Return what the server raised; None where no core or service of ours spoke."""
    info = _error_info(error)
    sentence = error.details() or ""
    if info is None:
        return None
    if info.reason == TRANSPORT:
        service, target = info.metadata["service"], info.metadata["target"]
        return TransportError(sentence, service=service, target=target)
    metadata = info.metadata
    names = [name for name in metadata["numbers"].split(",") if name]
    return make_error(
        Reason(info.reason),
        sentence,
        lineage=Lineage(metadata["lineage"]) if "lineage" in metadata else None,
        **{name: json.loads(metadata[name]) for name in names},
    )


def _error_info(error: grpc.aio.AioRpcError) -> ErrorInfo | None:
    """Return our ErrorInfo; one of a newer service's reasons counts as none."""
    info = ErrorInfo()
    details = (error.trailing_metadata() or {}).get(_DETAILS_KEY, b"")
    assert isinstance(details, bytes), _DETAILS_KEY
    for detail in Status.FromString(details).details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            known = info.reason == TRANSPORT or info.reason in Reason.__members__
            return info if known else None
    return None


def _status(
    code: grpc.StatusCode, reason: str, sentence: str, metadata: dict[str, str]
) -> grpc.Status:
    detail = AnyMessage()
    detail.Pack(ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))
    number, _name = code.value
    text = _cut(sentence, SENTENCE_CHARS_MAX)
    status = Status(code=number, message=text, details=[detail])
    return rpc_status.to_status(status)


def _to_json(value: int | str) -> str:
    if isinstance(value, str):
        return json.dumps(_cut(value, STRING_CHARS_MAX))
    return json.dumps(int(value))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
