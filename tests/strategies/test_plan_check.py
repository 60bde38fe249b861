"""Plans that no client can follow are refused by name, on both sides."""

from dataclasses import replace

import pytest

from fedlora.adapters import METHODS
from fedlora.messages import RoundPlan
from fedlora.strategies.plan_check import plan_problem
from tests.server.cases import make_spec

PLAN = RoundPlan("run", 1, 0, "ann", ("A", "B"), 2, 5)


def problem(method="lora", **changes):
    return plan_problem(replace(PLAN, **changes), make_spec(method), METHODS[method])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factors": ("B",), "rank": 1, "rates": {"B": 2.0}},
        {"kept": ("B", "heads")},
        {"proximal": 0.1, "proximal_product": True, "control": True},
        {"tail_slot": 1, "tail_weight": 0.1},
        {"factors": ("B",), "slots": 2},
    ],
    ids=str,
)
def test_what_clients_can_do(changes):
    assert problem(**changes) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "gives rank 0; the adapter has 2"),
        ({"rank": 10**9}, "gives rank 1000000000; the adapter has 2"),
        ({"factors": ("A", "R")}, "trains factor 'R'; method 'lora' has A, B"),
        ({"factors": ("A", "A")}, "names a factor twice"),
        ({"kept": ("Z",)}, "keeps factor 'Z'"),
        ({"rates": {"b": 2.0}}, "gives a rate to factor 'b'"),
        ({"method": "dora", "proximal": 0.1, "proximal_product": True}, "has proximal_product"),
        ({"method": "dora", "tail_weight": 0.1}, "has tail_weight"),
        ({"factors": ("B",), "tail_weight": 0.1}, "A and B must be trained"),
        ({"slots": 2}, "one factor must be trained"),
        ({"slots": 2, "factors": ("B",), "control": True}, "without control"),
        ({"slots": 2, "factors": ("B",), "kept": ("heads",)}, "one factor must be trained"),
    ],
    ids=str,
)
def test_what_clients_cannot_do(changes, message):
    assert message in problem(**changes)
