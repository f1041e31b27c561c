from __future__ import annotations

import pytest

from gmem.testing.conformance import kvm_abi as abi
from gmem.testing.conformance.guest import Fill, Load, MapGpaRange, Out, Store
from gmem.testing.conformance.kernel_guest import BASE, Payload
from gmem.uapi.pages import SIZE_1G, SIZE_2M

# As a C compiler makes them of <linux/kvm.h> on x86-64.
NUMBERS = {
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_CREATE_VM": 0xAE01,
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_CREATE_VCPU": 0xAE41,
    "KVM_SET_USER_MEMORY_REGION2": 0x40A0AE49,
    "KVM_RUN": 0xAE80,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_CREATE_GUEST_MEMFD": 0xC040AED4,
    "KVM_PRE_FAULT_MEMORY": 0xC040AED5,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_request_has_the_number_of_the_kernel(name: str) -> None:
    assert getattr(abi, name) == NUMBERS[name]


def test_a_program_becomes_machine_code() -> None:
    payload = Payload.of([Store(4 << 30, b"AB"), Out(0x3F8, 7)])
    assert payload.memory[0x5000:0x5025].hex(" ") == (
        "fc be 00 50 01 10 bf 00 00 00 40 b9 02 00 00 00 f3 a4 "
        "ff 04 25 00 40 00 10 b8 07 00 00 00 ba f8 03 00 00 ef ff"
    )


def test_the_page_tables_map_what_the_program_touches() -> None:
    payload = Payload.of([Load(5 * SIZE_1G - 1, 2), Fill(3 * SIZE_2M, 1, 0)])

    def entry(table: int, index: int) -> int:
        at = table + 8 * index
        return int.from_bytes(payload.memory[at : at + 8], "little")

    assert entry(0, 0) == BASE + 0x1000 | 3
    assert entry(0x1000, 1) == BASE + 0x3000 | 3
    frames = [5 * SIZE_1G - SIZE_2M, 5 * SIZE_1G, 3 * SIZE_2M]
    assert [entry(0x3000, n) for n in range(4)] == [*(f | 0x83 for f in frames), 0]
    assert entry(0x2000, BASE // SIZE_2M) == BASE | 0x83


def test_a_program_without_private_memory_cannot_ask_for_it() -> None:
    with pytest.raises(NotImplementedError, match="MapGpaRange"):
        Payload.of([MapGpaRange(0, 1, private=True)])
