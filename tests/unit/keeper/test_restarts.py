from __future__ import annotations

from gmem.keeper.restarts import (
    LONG_LIFE_SECONDS,
    PAUSE_SECONDS,
    PAUSE_SECONDS_MAX,
    RESTART_SECONDS,
    RESTARTS_MAX,
    Restarts,
)


def test_a_service_that_lived_long_is_started_at_once() -> None:
    restarts = Restarts()
    for life in range(1, 20):
        now = life * RESTART_SECONDS
        assert restarts.next(now, LONG_LIFE_SECONDS) == now


def test_half_of_the_starts_of_half_a_minute_are_spent_at_once() -> None:
    restarts = Restarts()
    assert [restarts.next(1.0, 0.0) for _ in range(RESTARTS_MAX + 1)] == [
        1.0,
        1.0,
        1.0 + PAUSE_SECONDS,
        1.0 + 2 * PAUSE_SECONDS,
        1.0 + 4 * PAUSE_SECONDS,
        None,
    ]


def test_a_single_start_that_is_allowed_waits() -> None:
    assert Restarts(limit=1).next(1.0, 0.0) == 1.0 + PAUSE_SECONDS


def test_short_lives_make_pauses_longer_up_to_a_limit() -> None:
    restarts = Restarts(limit=100)
    pauses = [restarts.next(1.0, 0.0) for _ in range(60)]
    assert pauses[:50] == [1.0] * 50
    assert pauses[50:53] == [1 + PAUSE_SECONDS, 1 + 2 * PAUSE_SECONDS, 3.0]
    assert pauses[-1] == 1 + PAUSE_SECONDS_MAX
    assert restarts.next(1.0, LONG_LIFE_SECONDS) == 1.0
    assert restarts.next(1.0, 0.0) == 1 + PAUSE_SECONDS
    # Those of long ago count no more: it begins again at once.
    assert restarts.next(2.0 + RESTART_SECONDS, 0.0) == 2.0 + RESTART_SECONDS


def test_it_is_given_up_after_five_in_half_a_minute_and_only_then() -> None:
    restarts = Restarts()
    for number in range(RESTARTS_MAX):
        assert restarts.next(float(number), LONG_LIFE_SECONDS) is not None
    assert restarts.next(5.0, LONG_LIFE_SECONDS) is None
    # The first of the five was long ago.
    assert restarts.next(RESTART_SECONDS + 0.5, LONG_LIFE_SECONDS) is not None
