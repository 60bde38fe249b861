"""Calls are served in the order in which they came, and hear the truth about it."""

import pytest

from fedlora.client.line import Line, LineClosed, LineFull


class Caller:
    def __init__(self):
        self.heard = []

    def ahead(self, count):
        self.heard.append(count)

    def lost(self):
        self.heard.append("lost")


def joined(line, count):
    callers = [Caller() for _ in range(count)]
    for caller in callers:
        line.join(caller)
    return callers


def test_order_and_places():
    line = Line(5)
    first, second, third = joined(line, 3)
    assert [line.next(0) for _ in range(3)] == [first, second, third]
    # what is served counts: the second hears of one ahead twice, waiting and being served
    assert first.heard == [0, 0, 0]
    assert second.heard == [1, 1, 1]
    assert third.heard == [2, 2, 1]
    assert line.next(0) is None


def test_who_leaves_is_not_served():
    line = Line(5)
    first, second, third = joined(line, 3)
    line.leave(second)
    line.leave(second)
    assert third.heard[-1] == 1
    assert [line.next(0), line.next(0), line.next(0)] == [first, third, None]


def test_the_line_is_bounded():
    line = Line(2)
    first, _ = joined(line, 2)
    with pytest.raises(LineFull):
        line.join(Caller())
    assert line.next(0) is first
    joined(line, 1)
    assert line.waiting == 2


def test_a_closed_line_serves_nobody():
    line = Line(2)
    (caller,) = joined(line, 1)
    assert not line.close_if_empty()
    line.close()
    assert caller.heard[-1] == "lost"
    assert line.next(None) is None
    with pytest.raises(LineClosed):
        line.join(Caller())
    other = Line(1)
    assert other.close_if_empty()
    with pytest.raises(LineClosed):
        other.join(Caller())
