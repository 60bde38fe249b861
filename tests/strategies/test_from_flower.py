"""Flower's stock strategies inside fedlora, against Flower's classes called directly."""

import gc
import subprocess
import sys
from dataclasses import replace

import flwr.serverapp.strategy as stock
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata

from fedlora.adapter import AdapterState
from fedlora.adapters import METHODS
from fedlora.adapters.base import LayerSpec
from fedlora.errors import ConfigError
from fedlora.messages import ClientUpdate, RoundPlan
from fedlora.strategies.base import ClientInfo, Conditions
from fedlora.strategies.conformance import LAWS, federations, findings
from fedlora.strategies.flower_rules import REFUSED, RULES
from fedlora.strategies.plugin import find_strategy
from fedlora.wire import decode_own, encode_tensors
from tests.server.cases import make_spec, random_state
from tests.simulation.runs import Run
from tests.strategies.rounds import make, update

CASES = [
    ("FedAvg", {}),
    ("FedProx", {"proximal_mu": 0.1}),
    ("FedAvgM", {"server_learning_rate": 0.7, "server_momentum": 0.9}),
    ("FedAvgM", {}),
    ("FedAdam", {"eta": 0.03, "tau": 0.01}),
    ("FedAdagrad", {"eta": 0.03}),
    ("FedYogi", {"beta_2": 0.9}),
    ("FedMedian", {}),
    ("FedTrimmedAvg", {"beta": 0.2}),
    ("Krum", {"num_malicious_nodes": 1}),
    ("MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}),
    ("Bulyan", {"num_malicious_nodes": 1}),
]
NAMES = [f"client-{i}" for i in range(7)]
WEIGHTS = (3.0, 1.0, 7.5, 2.0, 1.0, 4.0, 2.5)
each = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: str(v))


@pytest.fixture(autouse=True)
def small_heap():
    """Flower's Bulyan collects garbage once per reply, over all that the test process holds."""
    gc.freeze()
    yield
    gc.unfreeze()


def bridge(name, options=(), method="lora"):
    return find_strategy(f"flwr:{name}")(METHODS[method], dict(options))


def begin(chosen, method="lora"):
    return chosen.init(random_state(make_spec(method)))


def clients(chosen, state, seed=0, count=7):
    return [
        update(chosen, state, name, 10 * state.round + seed + i, weight)
        for i, (name, weight) in enumerate(zip(NAMES[:count], WEIGHTS, strict=False))
    ]


def step(chosen, state, updates):
    return chosen.refactor(state, chosen.reduce(state, updates))


def array_record(tensors):
    return ArrayRecord({k: Array(tensors[k].double().numpy()) for k in sorted(tensors)})


def reply(tensors, weight):
    metadata = Metadata(1, "m", 1, 0, "r", "", 0.0, 1.0, "train")
    metrics = MetricRecord({"num-examples": weight})
    content = RecordDict({"a": array_record(tensors), "m": metrics})
    return Message(content=content, metadata=metadata)


class NoNodes:
    def get_node_ids(self):
        return []


def test_every_stock_class_is_either_taken_or_refused():
    known = set(RULES) | {name for name in REFUSED if not name.startswith("SecAgg")}
    assert known == set(stock.__all__) - {"Strategy", "Result"}


@each
def test_rounds_equal_those_of_flowers_class(name, options):
    """One Flower object for all rounds, given every reply, as Flower's own loop does it."""
    chosen = bridge(name, options)
    state = begin(chosen)
    flower = getattr(stock, name)(**options, min_train_nodes=0, min_available_nodes=0)
    for number in range(1, 5):
        updates = clients(chosen, state)
        flower.configure_train(
            number, array_record(chosen.adapter(state).tensors), ConfigRecord(), NoNodes()
        )
        arrays, _ = flower.aggregate_train(number, [reply(u.trained, u.weight) for u in updates])
        state = step(chosen, state, updates)
        assert arrays.keys() == chosen.adapter(state).tensors.keys()
        for key, array in arrays.items():
            found = state.tensors[key]
            torch.testing.assert_close(
                found.double(), torch.from_numpy(array.numpy()), rtol=2e-6, atol=1e-7
            )


def test_fedavg_is_fedit():
    fedit, state, _ = make("fedit")
    chosen = bridge("FedAvg")
    for _ in range(3):
        updates = clients(fedit, state)
        found, expected = step(chosen, state, updates), step(fedit, state, updates)
        assert found.tensors.keys() == expected.tensors.keys()
        for key in found.tensors:
            assert torch.equal(found.tensors[key], expected.tensors[key])
        state = expected


@each
def test_a_resumed_run_has_the_same_bits(name, options):
    """Each round by a new object from a state that went through bytes."""
    whole = begin(bridge(name, options))
    pieces = whole
    for _ in range(4):
        chosen = bridge(name, options)
        saved = decode_own(encode_tensors(pieces.tensors))
        pieces = step(chosen, replace(pieces, tensors=saved), clients(chosen, pieces))
    chosen = bridge(name, options)
    for _ in range(4):
        whole = step(chosen, whole, clients(chosen, whole))
    assert whole.round == pieces.round == 4
    assert encode_tensors(whole.tensors) == encode_tensors(pieces.tensors)


@pytest.mark.parametrize("name", ["FedAdam", "FedAvgM"])
def test_what_flower_keeps_changes_the_next_round(name):
    options = {"server_momentum": 0.9} if name == "FedAvgM" else {}
    chosen = bridge(name, options)
    state = step(chosen, begin(chosen), clients(chosen, begin(chosen)))
    held = chosen.adapter(state).tensors
    assert set(held) < set(state.tensors)
    assert all(t.dtype == torch.float32 for t in state.tensors.values())
    updates = clients(chosen, state)
    with_memory = step(chosen, state, updates)
    without = step(chosen, replace(state, tensors=held), updates)
    assert not torch.equal(with_memory.tensors["p.A"], without.tensors["p.A"])


@each
def test_nothing_that_was_given_is_changed(name, options):
    """Flower's median and trimmed mean take the arrays out of the replies they are given."""
    chosen = bridge(name, options)
    state = step(chosen, begin(chosen), clients(chosen, begin(chosen)))
    updates = clients(chosen, state)
    before = {k: t.clone() for k, t in state.tensors.items()}
    first, again = step(chosen, state, updates), step(chosen, state, updates)
    assert all(torch.equal(before[k], state.tensors[k]) for k in before)
    assert encode_tensors(first.tensors) == encode_tensors(again.tensors)


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "miss"])
def test_any_method_of_equal_ranks(method):
    chosen = bridge("FedMedian", method=method)
    spec = make_spec(method)
    chosen.check(Conditions(spec, [spec.rank] * 3))
    with pytest.raises(ConfigError, match="needs equal ranks"):
        chosen.check(Conditions(spec, [spec.rank, 1]))
    state = begin(chosen, method)
    updates = clients(chosen, state, count=3)
    new = step(chosen, state, updates)
    for key in new.tensors:
        expected = np.median([u.trained[key].numpy() for u in updates], axis=0)
        torch.testing.assert_close(new.tensors[key].numpy(), expected.astype("float32"))


def test_a_rule_of_the_mean_is_linear_and_holds_no_client():
    for name, rule in RULES.items():
        chosen = bridge(name)
        assert chosen.linear == rule.mean
        assert chosen.privacy == ({"record", "client"} if rule.mean else {"record"})


def test_bulyan_with_too_few_replies_merges_nothing_and_says_so():
    chosen = bridge("Bulyan", {"num_malicious_nodes": 1})
    state = begin(chosen)
    stats = chosen.reduce(state, clients(chosen, state, count=6))
    assert stats.notes == {
        "flwr:Bulyan": "flwr:Bulyan gave no result for 6 updates; nothing was merged"
    }
    new = chosen.refactor(state, stats)
    assert new.round == 1
    assert all(torch.equal(new.tensors[k], state.tensors[k]) for k in state.tensors)


def test_krum_sees_small_updates_of_large_parameters():
    """In float32 the rounding of ||x||^2 would be larger than every distance here."""
    chosen = bridge("Krum", {"num_malicious_nodes": 1})
    spec = replace(make_spec(heads=False), layers=(LayerSpec("p", 6, 5, 2, 1.0),))
    big = {"p.A": torch.full((2, 5), 300.0), "p.B": torch.full((6, 2), -300.0)}
    state = chosen.init(AdapterState(spec, big))
    moves = [0.030, 0.034, 0.036, 0.050, 0.9]  # the third lies best among its neighbours
    updates = [
        ClientUpdate(
            "run",
            1,
            0,
            NAMES[i],
            "",
            AdapterState(spec, {k: torch.full_like(t, move) for k, t in big.items()}),
            1.0,
            start=AdapterState(spec, big),
            weight=1.0,
        )
        for i, move in enumerate(moves)
    ]
    near = [sorted((m - other) ** 2 for other in moves)[1:3] for m in moves]
    best = moves[min(range(5), key=lambda i: sum(near[i]))]
    new = step(chosen, state, updates)
    torch.testing.assert_close(new.tensors["p.A"], big["p.A"] + best, rtol=0, atol=1e-4)


def test_the_proximal_weight_reaches_the_clients():
    state = begin(bridge("FedProx"))
    blank = RoundPlan("run", 1, 0, "ann", (), 2, 1)
    for name, options, expected in [
        ("FedProx", {"proximal_mu": 0.25}, 0.25),
        ("FedProx", {"proximal_mu": 0}, 0.0),
        ("FedAvg", {}, 0.0),
    ]:
        plan = bridge(name, options).plan(state, ClientInfo("ann", 2), blank)
        assert plan.proximal == expected
        assert plan.factors == ("A", "B")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_meaning_here_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=rf'"flwr:{name}": {name} .*; choose '):
        find_strategy(f"flwr:{name}")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FedAdam", {"etta": 0.1}, r'etta is not known.*\(did you mean "eta"\?\); known: eta, bet'),
        ("FedAdam", {"eta": "0.1"}, "eta = '0.1' is a str; expected a float"),
        (
            "FedAdam",
            {"eta_l": 0.1},
            "eta_l of flwr:FedAdam .*training.learning_rate; .* takes: eta",
        ),
        ("FedAvg", {"fraction_train": 0.5}, "clients_per_round.*flwr:FedAvg takes: none"),
        ("FedAvg", {"eta": 0.5}, "eta is not known to strategy 'flwr:FedAvg'; known: none"),
        ("Bulyan", {"selection_rule": "krum"}, "a job file holds no functions"),
        ("FedTrimmedAvg", {"beta": 0.5}, r"flwr:FedTrimmedAvg refuses them: `beta` must be in"),
        ("FedProx", {"proximal_mu": -1.0}, "proximal_mu = -1; expected 0 or more"),
    ],
)
def test_options_are_those_of_the_constructor(name, options, message):
    with pytest.raises(ConfigError, match=message):
        bridge(name, options)


def test_unknown_names_get_a_hint():
    with pytest.raises(ConfigError, match=r'\(did you mean "FedAdam"\?\); known: flwr:Bulyan, '):
        find_strategy("flwr:FedAdan")


@pytest.mark.parametrize("module", ["fedlora.strategies", "fedlora.strategies.plugin"])
def test_flower_is_imported_only_when_it_is_used(module):
    code = f"import sys, {module}; print('flwr' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("FedAdam", {"eta": 0.01}), ("FedProx", {"proximal_mu": 0.5}), ("FedMedian", {})],
)
def test_a_run_in_pieces_equals_a_run_in_one_bit_for_bit(make_job, tmp_path, name, options):
    federation = {"strategy": f"flwr:{name}", "strategy_options": options}
    whole, pieces = (Run(make_job(federation=federation), tmp_path / k) for k in "ab")
    whole.go()
    for until in (1, 3):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert len(set(whole.adapters())) == 3
    assert whole.file(3) == pieces.file(3)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_waives_the_laws_of_counting_that_it_breaks_and_no_other(name):
    laws = [law for law in LAWS if law.waivable or law.name == "waivers"]
    [made] = federations(find_strategy(f"flwr:{name}"), {"lora": METHODS["lora"]})
    found = list(findings(made, laws))
    assert {f.law.name: f.found for f in found if f.verdict == "broken"} == {}
    assert {f.law.name for f in found if f.verdict == "waived"} == RULES[name].waives.keys()
