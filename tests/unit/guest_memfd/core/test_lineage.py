"""What the series disagree on is in one table, and every effect has one kind.

That nothing else decides by lineage says tests/tidy/test_lineages.py.
"""

from __future__ import annotations

from gmem.effects import Effect, Mode
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.lineage import RULES, Operation
from gmem.uapi.lineage import Lineage


def test_every_lineage_has_rules_for_every_operation() -> None:
    assert set(RULES) == set(Lineage)
    for rules in RULES.values():
        assert set(rules.lock_modes) == set(Operation)


def test_only_the_guest_fault_of_the_first_series_is_without_a_lock() -> None:
    modes = RULES[Lineage.RFC_V1].lock_modes
    # No lock of the inode guards its memory policies either.
    free = {op for op, mode in modes.items() if mode is None}
    assert free == {Operation.GET_PFN, Operation.SET_MEMPOLICY}
    assert {op for op, mode in modes.items() if mode is Mode.SHARED} == {
        Operation.ALLOCATE,
        Operation.HOST_FAULT,
        Operation.PIN,
        Operation.READ,
    }


def test_every_effect_is_of_exactly_one_kind() -> None:
    defined = [
        value
        for value in vars(fx).values()
        if isinstance(value, type) and issubclass(value, Effect) and value is not Effect
    ]
    kinds: list[type] = [*fx.REMOTE, *fx.BLOCKING, *fx.LOCAL]
    assert sorted(kinds, key=str) == sorted(defined, key=str)
