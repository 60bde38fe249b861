"""Transfers: places are counted, and who stands still loses his."""

import pytest

from fedlora.server.transfers import Transfers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_there_are_so_many_places_and_no_more():
    places = Transfers(2, 10.0)
    with places.admit(int) as first, places.admit(int) as second, places.admit(int) as third:
        assert first is not None
        assert second is not None
        assert third is None
        assert len(places) == 2
    with places.admit(int) as fourth:
        assert fourth is not None
    assert len(places) == 0


def test_only_what_stands_still_is_cancelled():
    clock, cancelled = Clock(), []
    places = Transfers(9, 10.0, clock)
    with places.admit(lambda: cancelled.append("slow")) as slow:
        with places.admit(lambda: cancelled.append("stalled")):
            for clock.now in range(10):
                slow.progress()
                places.sweep()
            assert cancelled == []
            clock.now = 10.0
            places.sweep()
            assert cancelled == ["stalled"]
        clock.now = 18.9
        places.sweep()
    clock.now = 100.0
    places.sweep()
    assert cancelled == ["stalled"]


def test_nobody_has_more_than_his_share():
    places = Transfers(9, 10.0, most_each=2)
    with (
        places.admit(int, "a") as first,
        places.admit(int, "a") as second,
        places.admit(int, "a") as third,
        places.admit(int, "b") as other,
    ):
        assert (first is not None, second is not None, third, other is not None) == (
            True,
            True,
            None,
            True,
        )
    with places.admit(int, "a") as again:
        assert again is not None


@pytest.mark.parametrize(("rate", "ends"), [(1, 11), (50, 21), (80, 51), (100, 0), (101, 0)])
def test_a_byte_now_and_then_is_no_transfer(rate, ends):
    """After 10 s of grace: the first second t in which rate * t < 100 * (t - 10)."""
    clock, cancelled = Clock(), []
    places = Transfers(9, 10.0, clock, slowest=100.0)
    with places.admit(lambda: cancelled.append(clock.now)) as moving:
        while clock.now < 2000 and not cancelled:
            clock.now += 1
            moving.progress(rate)
            places.sweep()
    assert cancelled == ([ends] if ends else [])
