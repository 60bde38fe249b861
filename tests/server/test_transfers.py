"""Transfers: places are counted, and who stands still loses his."""

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
