"""Who a client is: its name, its folder, and the lock that keeps others out."""

import os

import pytest

from fedlora.cli.client import take_seat
from fedlora.errors import ConfigError


@pytest.fixture
def take(tmp_path):
    seats = []

    def seat(name=None, partition=None, data=None, home=None):
        seats.append(take_seat(home or tmp_path / "home", name, partition, data))
        return seats[-1]

    yield seat
    for taken in seats:
        os.close(taken.lock)


def test_a_partition_has_the_name_that_a_simulation_gives_it(take):
    seat = take(partition="7")
    assert (seat.name, seat.partition) == ("client-007", 7)


def test_replicas_take_the_first_free_places(take, tmp_path):
    seats = [take(partition="auto") for _ in range(3)]
    assert [(s.name, s.partition) for s in seats] == [(f"client-00{k}", k) for k in range(3)]
    assert {s.home for s in seats} == {tmp_path / "home" / f"client-00{k}" for k in range(3)}


def test_a_place_that_was_left_is_taken_again(tmp_path):
    first, second = (take_seat(tmp_path, None, "auto", None) for _ in range(2))
    os.close(first.lock)
    third = take_seat(tmp_path, None, "auto", None)
    assert (third.name, second.name) == ("client-000", "client-001")
    os.close(second.lock)
    os.close(third.lock)


def test_a_folder_serves_one_client_at_a_time(take, tmp_path):
    take(name="ann")
    with pytest.raises(ConfigError, match="in use by another client"):
        take(name="bob")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "give --name NAME, or --partition"),
        ({"partition": "0", "data": "rows.csv"}, "--data and --partition were both given"),
        ({"partition": "auto", "name": "ann"}, "leave --name out"),
        ({"partition": "-1"}, "expected a number from 0, or auto"),
    ],
)
def test_options_that_do_not_go_together_are_named(take, options, why):
    with pytest.raises(ConfigError, match=why):
        take(**options)
