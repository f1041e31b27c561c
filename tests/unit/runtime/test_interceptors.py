"""What a request is called in the log."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as gmem_pb
from gmem.api.types.v1.types_pb2 import RequestId
from gmem.api.vmm.v1 import vmm_pb2
from gmem.runtime.interceptors import names_of

INODE, VM = "hosts/host0/guestMemfds/12", "hosts/host0/vms/demo"


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (vmm_pb2.GetVmRequest(name=VM), {"vm": "demo"}),
        (gmem_pb.GetPfnRequest(name=INODE, vm=VM), {"inode": "12", "vm": "demo"}),
        (
            gmem_pb.ConvertRangeRequest(
                request_id=RequestId(client="a", id="7"),
                ranges=[gmem_pb.Range(name=INODE)],
            ),
            {"request_id": "7", "inode": "12"},
        ),
        (vmm_pb2.GetVmRequest(name="vms"), {}),
        (vmm_pb2.GetVmRequest(name="nonsense/vms/"), {"vm": ""}),
        (vmm_pb2.WatchRequest(), {}),
    ],
)
def test_a_request_is_named_as_far_as_it_says(
    request_: Message, names: dict[str, str]
) -> None:
    assert names_of(request_) == names
