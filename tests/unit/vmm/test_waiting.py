"""KVM_SET_MEMORY_ATTRIBUTES that waits: outside the lock, with the guest running on."""

from __future__ import annotations

import pytest

from gmem.uapi.errors import BadRequest, Contended, Reason
from gmem.uapi.flags import KVM_MEMORY_ATTRIBUTE_PRIVATE
from gmem.uapi.pages import PAGE_SIZE
from gmem.uapi.waits import WAIT_MS_MAX
from gmem.vmm.core.effects import Convert, StartWait, WaitConvertible
from gmem.vmm.core.memslots import Region, Userspace
from gmem.vmm.core.set_attributes import set_memory_attributes
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.core.vm import Vm
from tests.support.vmm_world import Hand, World, new_vm

GPA = 0x100000
DEADLINE = Contended(Reason.DEADLINE, "held by nic", holders="nic")


def to_private(vm: Vm, wait_ms: int | None = 1000) -> Hand[bool]:
    private = KVM_MEMORY_ATTRIBUTE_PRIVATE
    return Hand(
        set_memory_attributes(vm, GPA, PAGE_SIZE, attributes=private, wait_ms=wait_ms)
    )


def vm_with_a_slot() -> Vm:
    vm = new_vm()
    side = Userspace("descriptors/1", 0)
    region = Region(0, 4, GPA, 4 * PAGE_SIZE, side, "hosts/h/guestMemfds/1")
    World().run(set_user_memory_region2(vm, region))
    return vm


def begun(vm: Vm) -> Hand[bool]:
    """A conversion at its wait: the first attempt met pages in use."""
    hand = to_private(vm)
    started = hand.effect
    assert started == StartWait(1000)
    hand.reply(77_000)
    attempt = hand.effect
    assert isinstance(attempt, Convert)
    assert not attempt.undone
    hand.fail(DEADLINE)
    return hand


def test_it_waits_without_the_lock_and_without_a_bracket() -> None:
    vm = vm_with_a_slot()
    hand = begun(vm)
    assert isinstance(hand.effect, WaitConvertible)
    assert (hand.effect.instant, hand.effect.to_shared) == (77_000, False)
    assert vm.slots_lock.idle
    assert vm.invalidation.in_progress == 0
    assert not vm.attributes.is_private(GPA // PAGE_SIZE)


def test_then_it_begins_again() -> None:
    vm = vm_with_a_slot()
    hand = begun(vm)
    hand.reply(None)
    assert isinstance(hand.effect, Convert)
    hand.fail(DEADLINE)
    hand.reply(None)
    hand.reply(None)
    assert hand.result()
    assert vm.attributes.is_private(GPA // PAGE_SIZE)
    assert vm.slots_lock.idle


def test_a_memslot_that_went_meanwhile_is_not_converted() -> None:
    vm = vm_with_a_slot()
    hand = begun(vm)
    vm.memslots.remove(0)
    hand.reply(None)
    assert hand.result()


def test_the_deadline_is_the_callers_answer() -> None:
    hand = begun(vm_with_a_slot())
    hand.fail(DEADLINE)
    with pytest.raises(Contended) as caught:
        hand.result()
    assert caught.value is DEADLINE


def test_other_refusals_are_not_waited_for() -> None:
    vm = vm_with_a_slot()
    hand = to_private(vm)
    hand.reply(77_000)
    refusal = Contended(Reason.INTERRUPTED, "guest_memfd stops")
    hand.fail(refusal)
    with pytest.raises(Contended) as caught:
        hand.result()
    assert caught.value is refusal
    assert vm.slots_lock.idle


def test_without_a_wait_the_series_refuses_and_rolls_back() -> None:
    hand = to_private(vm_with_a_slot(), wait_ms=None)
    attempt = hand.effect
    assert isinstance(attempt, Convert)
    assert attempt.undone
    hand.reply(None)
    assert hand.result()


def test_a_wait_too_long_is_refused() -> None:
    with pytest.raises(BadRequest) as caught:
        to_private(new_vm(), wait_ms=WAIT_MS_MAX + 1).result()
    assert caught.value.reason is Reason.ARGUMENT_INVALID
