"""Strategies of fedlora in a Flower app with PEFT clients, against fedlora's own rounds."""

import re
from dataclasses import replace

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora.adapter import AdapterState
from fedlora.adapters import METHODS
from fedlora.checkpoint import RunStore
from fedlora.errors import ConfigError, StrategyError
from fedlora.messages import ClientUpdate, Start
from fedlora.server.admission import Limits
from fedlora.server.handout import split_parts
from fedlora.server.link import Reply
from fedlora.server.rounds import run_rounds
from fedlora.server.run_parts import RoundSettings, RunParts
from fedlora.strategies import STRATEGIES, as_flower
from fedlora.strategies.base import ClientInfo
from fedlora.strategies.fedit import FedIT
from fedlora.strategies.fold import add_fold
from fedlora.strategies.wrappers.base import Wrapper
from fedlora.wire import decode_broadcast, decode_part, encode_update
from tests.strategies.flower_app import (
    NODES,
    PREFIX,
    Clients,
    MemoryGrid,
    arrays,
    failed,
    state_dict,
)

FREE = ["fedit", "fedsvd", "ffa-lora", "flexlora", "lora-fair", "lora-lego", "rolora"]
BOUND = {
    "fed-sb": "averages the matrix R of method lora-xs",
    "fedex-lora": "needs a client that adds a low-rank change to its frozen base weights",
    "fedsa-lora": "needs a client that keeps a part of the adapter to itself",
    "flora": "needs a client that draws factors from a seed",
    "hetlora": "needs a client that adds a penalty to its loss",
    "lora-a2": "needs a client that has a learning rate for each factor",
}


def test_every_strategy_is_either_served_or_refused():
    assert {*FREE, *BOUND} == set(STRATEGIES)


@pytest.fixture(autouse=True)
def identity():
    """What Flower sets in the process of a server app."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


@pytest.fixture
def clients():
    return Clients()


def start(flower, clients, rounds=3, answer=None, initial=None):
    """(arrays after each round, result, grid) of Flower's own loop."""
    kept = {}

    def keep(number, record):
        kept[number] = state_dict(record)

    grid = MemoryGrid(answer or clients.answer)
    first = arrays(initial or clients.initial)
    result = flower.start(grid, first, num_rounds=rounds, evaluate_fn=keep)
    return kept, result, grid


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class PeftLink:
    """The same PEFT clients behind fedlora's own rounds; everything crosses as bytes."""

    def __init__(self, spec, clients):
        self.spec, self.clients = spec, clients

    def roster(self):
        return [ClientInfo(f"{node:020d}", self.spec.rank) for node in NODES]

    def exchange(self, tasks, parts, deadline_s):
        for task in tasks:
            yield self.answer(task, parts)

    def answer(self, task, parts):
        broadcast = decode_broadcast(task.manifest)
        plan, method = broadcast.plan, METHODS[self.spec.method]
        shapes = {k: tuple(t.shape) for k, t in ours(self.clients.initial).items()}
        held = {}
        for part, digest in broadcast.parts.items():
            names = split_parts(Start(AdapterState(self.spec, dict.fromkeys(shapes))), {})[part]
            held |= decode_part(parts[digest], digest, {name: shapes[name] for name in names})
        factors = [f"lora_{factor}" for factor in plan.factors]
        ended = ours(self.clients.train(int(task.client), theirs(held), factors))
        sent = [
            k
            for k in held
            if k.rpartition(".")[2] not in method.factor_shapes(self.spec.layers[0])
            or k.rpartition(".")[2] in plan.factors
        ]
        update = ClientUpdate(
            run=plan.run,
            round=plan.round,
            attempt=plan.attempt,
            client=plan.client,
            start_sha256=broadcast.start_sha256,
            delta=AdapterState(self.spec, {k: ended[k] - held[k] for k in sent}),
            num_examples=10 + int(task.client) % 5,
        )
        manifest, payload = encode_update(update)
        return Reply(task.client, manifest, payload, 0, 1.0)


def ours(tensors):
    named = {}
    for key, tensor in tensors.items():
        own = re.sub(r"\.lora_([AB])\.weight$", r".\1", key)
        named[own.removeprefix(PREFIX) if own != key else key] = tensor
    return named


def theirs(tensors):
    return {
        k if k.startswith(PREFIX) else f"{PREFIX}{k[:-2]}.lora_{k[-1]}.weight": t
        for k, t in tensors.items()
    }


def own_rounds(strategy, spec, clients, folder, rounds):
    """The adapter after each round of fedlora's own loop."""
    settings = RoundSettings(
        seed=0, rounds=rounds, clients_per_round=None, quorum=None, deadline_s=60.0, retries=0,
        local_steps=1, optimizer_state="reset", evaluate_every=1, keep_rounds=2, keep_every=10,
        limits=Limits(1e4, 1e7),
    )  # fmt: skip
    state = strategy.init(AdapterState(spec, ours(clients.initial)))
    record = {"run": "peft", "extra": {}, "events": []}
    store = RunStore.create(folder, "", "job", state.tensors, record)
    parts = RunParts(
        run="peft", store=store, link=PeftLink(spec, clients), strategy=strategy,
        method=METHODS[spec.method], basis={}, sent_basis={}, settings=settings, evaluate=None,
        emit=lambda event: None,
    )  # fmt: skip
    adapters = {}
    for number in range(1, rounds + 1):
        state = run_rounds(parts, state, number)
        adapters[number] = theirs(strategy.adapter(state).tensors)
    return adapters


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("name", FREE)
def test_a_flower_app_makes_the_adapters_of_fedloras_own_rounds(name, method, clients, tmp_path):
    """Bit for bit: the same clients train the same in either."""
    flower = as_flower(STRATEGIES[name](METHODS[method]), rank=2, alpha=4)
    kept, result, _ = start(flower, clients, 4)
    spec = flower.state.spec
    assert [layer.scale for layer in spec.layers] == [METHODS[method].scale(2, 4)] * 2
    expected = own_rounds(STRATEGIES[name](METHODS[method]), spec, clients, tmp_path / "run", 4)
    for number, adapter in expected.items():
        assert same(kept[number], dict(adapter)), number
    assert same(state_dict(result.arrays), kept[4])
    assert list(result.arrays) == list(clients.initial)
    assert not same(kept[4], kept[3])


def test_fedit_is_the_plain_mean_of_what_came_back(clients):
    kept, _, _ = start(as_flower("fedit"), clients, 1)
    weights = {node: 10 + node % 5 for node in NODES}
    ended = {n: clients.train(n, clients.initial, ["lora_A", "lora_B"]) for n in NODES}
    for key, found in kept[1].items():
        total = sum(w * ended[n][key].double() for n, w in weights.items())
        mean = total / sum(weights.values())
        torch.testing.assert_close(found.double(), mean, rtol=1e-6, atol=1e-7)


GIVEN = {"name": "fedit", "class": FedIT, "instance": FedIT(METHODS["lora"])}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
def test_a_strategy_is_given_by_name_class_or_instance(given, clients):
    kept, _, _ = start(as_flower(given), clients, 1)
    assert same(kept[1], start(as_flower("fedit", rank=2, alpha=9.0), clients, 1)[0][1])


class Half(Wrapper):
    """Takes half of every step of the strategy inside."""

    name = "half"

    def refactor(self, state, stats):
        new = super().refactor(state, stats)
        tensors = {k: 0.5 * (t + state.tensors[k]) for k, t in new.tensors.items()}
        return replace(new, tensors=tensors)


def test_a_wrapper_goes_along(clients):
    kept, _, _ = start(as_flower(Half(FedIT(METHODS["lora"]))), clients, 1)
    whole, _, _ = start(as_flower("fedit"), clients, 1)
    for key, first in kept[0].items():
        assert torch.equal(kept[1][key], 0.5 * (whole[1][key] + first))


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: re.sub(r"\.lora_([AB])\.", r".lora_\1.default.", k),
        lambda k: re.sub(r"^base_model\.model\.(.*)\.lora_([AB])\.weight", r"\1.\2", k),
    ],
    ids=["peft-parameters", "fedlora"],
)
def test_names_of_arrays_change_nothing(rename, clients):
    """A client that renames at its door gets back what it would have got."""
    back = {rename(k): k for k in clients.initial}
    assert set(back) != set(clients.initial)

    def answer(message):
        content = RecordDict(dict(message.content.items()))
        named = state_dict(message.content["arrays"])
        content["arrays"] = arrays({back[k]: t for k, t in named.items()})
        told = message.content["config"].get("fedlora-factors", [])
        own = [f if f.startswith("lora_") else f"lora_{f}" for f in told]
        content["config"] = ConfigRecord({"fedlora-factors": own})
        inner = Message(content, reply_to=message)
        inner.metadata.__dict__["_dst_node_id"] = message.metadata.dst_node_id
        made = clients.content(inner)
        if "arrays" in made:
            made["arrays"] = arrays({rename(k): t for k, t in state_dict(made["arrays"]).items()})
        return [Message(made, reply_to=message)]

    initial = {rename(k): t for k, t in clients.initial.items()}
    kept, _, grid = start(as_flower("ffa-lora"), clients, 2, answer, initial)
    plain, _, _ = start(as_flower("ffa-lora"), clients, 2)
    assert same({back[k]: t for k, t in kept[2].items()}, plain[2])
    told = grid.sent[0].content["config"]["fedlora-factors"]
    assert told == (["B"] if "first.B" in initial else ["lora_B"])


def clients_once(clients, message):
    return clients.answer(message)


def spoil(change):
    """An answer whose content is changed."""

    def answer(clients, message):
        content = clients.content(message)
        change(content)
        return [Message(content, reply_to=message)]

    return answer


def array_of(key, make):
    def change(content):
        content["arrays"][key] = make(content["arrays"][key].numpy())

    return change


def metric_of(**values):
    return lambda content: content["metrics"].update(values)


KEY = f"{PREFIX}first.lora_B.weight"
FROZEN = f"{PREFIX}first.lora_A.weight"
BAD = {
    "an-error": (lambda clients, message: failed(message), "CLIENT_ERROR"),
    "twice": (lambda clients, message: clients.answer(message) * 2, "STALE"),
    "missing": (spoil(lambda c: c["arrays"].pop(KEY)), "HEADER"),
    "another": (spoil(lambda c: c["arrays"].update(x=Array(torch.ones(1)))), "HEADER"),
    "shape": (spoil(array_of(KEY, lambda a: Array(a.T.copy()))), "HEADER"),
    "dtype": (spoil(array_of(KEY, lambda a: Array(a.astype("float64")))), "HEADER"),
    "bytes": (
        spoil(array_of(KEY, lambda a: Array("float32", a.shape, "numpy.ndarray", b"no array"))),
        "HEADER",
    ),
    "stype": (
        spoil(array_of(KEY, lambda a: Array("float32", a.shape, "safetensors", a.tobytes()))),
        "HEADER",
    ),
    "nan": (spoil(array_of(KEY, lambda a: Array(a * float("nan")))), "NOT_FINITE"),
    "frozen-nan": (spoil(array_of(FROZEN, lambda a: Array(a * float("nan")))), "NOT_FINITE"),
    "far": (spoil(array_of(KEY, lambda a: Array(a + 1e5))), "NORM"),
    "no-arrays": (spoil(lambda c: c.pop("arrays")), "MANIFEST"),
    "two-arrays": (spoil(lambda c: c.update(more=ArrayRecord())), "MANIFEST"),
    "no-metrics": (spoil(lambda c: c.pop("metrics")), "MANIFEST"),
    "two-metrics": (spoil(lambda c: c.update(more=MetricRecord())), "MANIFEST"),
    "no-weight": (spoil(lambda c: c["metrics"].pop("num-examples")), "WEIGHT"),
    "zero": (spoil(metric_of(**{"num-examples": 0})), "WEIGHT"),
    "negative": (spoil(metric_of(**{"num-examples": -1})), "WEIGHT"),
    "nan-weight": (spoil(metric_of(**{"num-examples": float("nan")})), "WEIGHT"),
    "too-many": (spoil(metric_of(**{"num-examples": 1e300})), "WEIGHT"),
    "list": (spoil(metric_of(**{"num-examples": [1, 2]})), "WEIGHT"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_one_failed_client_and_the_run_goes_on(kind, clients):
    """The others' result is that of a round in which this client failed (or came once)."""
    bad, code = BAD[kind]
    told = []

    def answer(reply):
        def by_node(message):
            training = message.metadata.message_type == "train"
            config = message.content["config"]
            hit = training and message.metadata.dst_node_id == NODES[1]
            if hit and config["server-round"] == 2:
                return reply(clients, message)
            if not training and config["server-round"] == 2:
                told.extend(flower.rejected)
            return clients.answer(message)

        return by_node

    flower = as_flower("ffa-lora")
    kept, result, _ = start(flower, clients, 3, answer(bad))
    found = {(e.client, e.code) for e in told}
    assert found == {(f"{NODES[1]:020d}", code)}
    instead = clients_once if kind == "twice" else BAD["an-error"][0]
    flower = as_flower("ffa-lora")
    expected, _, _ = start(flower, clients, 3, answer(instead))
    assert all(same(kept[n], expected[n]) for n in range(4))
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx(1.5)


def test_a_round_without_a_usable_reply_changes_nothing_and_is_not_counted(clients):
    """RoLoRA's turn goes on where it stood: the factor of the lost round comes next."""

    def answer(message):
        lost = message.content["config"]["server-round"] == 2
        return failed(message) if lost else clients.answer(message)

    kept, result, grid = start(as_flower("rolora"), clients, 3, answer)
    assert same(kept[2], kept[1])
    assert 2 not in result.train_metrics_clientapp
    expected, _, _ = start(as_flower("rolora"), clients, 2)
    assert same(kept[3], expected[2])
    told = [
        m.content["config"].get("fedlora-factors")
        for m in grid.sent
        if "arrays" in m.content
        and m.metadata.message_type == "train"
        and m.metadata.dst_node_id == NODES[0]
    ]
    assert told == [["lora_B"], ["lora_A"], ["lora_A"]]


def test_a_frozen_factor_keeps_its_bits_whatever_clients_send(clients):
    def answer(message):
        if message.metadata.message_type == "train":
            message.content["config"]["fedlora-factors"] = ["lora_A", "lora_B"]
        return clients.answer(message)

    kept, _, _ = start(as_flower("ffa-lora"), clients, 2, answer)
    for key, first in clients.initial.items():
        assert torch.equal(kept[2][key], first) == ("lora_A" in key)


def test_metrics_are_averaged_where_all_replies_have_them(clients):
    """Also of another length, or by some clients only; Flower would end the app at these."""

    def answer(message):
        content = clients.content(message)
        node = message.metadata.dst_node_id
        odd = {"only": 1.0, "list": [1.0] * 3} if node == NODES[0] else {"list": [1.0, 2.0]}
        content["metrics"].update(odd)
        return [Message(content, reply_to=message)]

    _, result, _ = start(as_flower("fedit"), clients, 1, answer)
    assert dict(result.train_metrics_clientapp[1]) == {"loss": pytest.approx(1.5)}
    weights = [10 + node % 5 for node in NODES]
    mean = sum(w * n for w, n in zip(weights, NODES, strict=True)) / sum(weights)
    assert dict(result.evaluate_metrics_clientapp[1]) == {"loss": pytest.approx(mean)}


def test_a_bad_evaluation_reply_is_left_out(clients):
    def answer(message):
        evaluating = message.metadata.message_type == "evaluate"
        if evaluating and message.metadata.dst_node_id == NODES[0]:
            return [Message(RecordDict(), reply_to=message)]
        if evaluating and message.metadata.dst_node_id == NODES[1]:
            return failed(message)
        return clients.answer(message)

    _, result, _ = start(as_flower("fedit"), clients, 1, answer)
    assert result.evaluate_metrics_clientapp[1]["loss"] == pytest.approx(float(NODES[2]))


def test_another_process_goes_on_from_the_state(clients):
    """By the state's public fields; RoLoRA would otherwise begin with B again."""
    whole, _, _ = start(as_flower("rolora"), clients, 3)
    first = as_flower("rolora")
    kept, _, _ = start(first, clients, 1)
    then = as_flower("rolora")
    then.state = replace(first.state)
    rest, _, _ = start(then, clients, 2, initial=kept[1])
    assert same(rest[2], whole[3])
    anew, _, _ = start(as_flower("rolora"), clients, 2, initial=kept[1])
    assert not same(anew[2], whole[3])


def test_other_initial_arrays_begin_anew(clients):
    flower = as_flower("rolora")
    kept, _, _ = start(flower, clients, 1)
    again, _, _ = start(flower, clients, 1)
    assert flower.state.round == 1
    assert same(kept[1], again[1])


def test_flowers_own_arguments_and_config_pass_through(clients):
    config = ConfigRecord({"lr": 0.1})
    grid = MemoryGrid(clients.answer)
    flower = as_flower("fedit", fraction_evaluate=0.0, min_train_nodes=3)
    flower.start(grid, arrays(clients.initial), num_rounds=2, train_config=config)
    assert dict(config) == {"lr": 0.1}
    told = [dict(m.content["config"]) for m in grid.sent]
    assert [t["server-round"] for t in told] == [1, 1, 1, 2, 2, 2]
    assert all(t["lr"] == 0.1 and t["fedlora-factors"] == ["lora_A", "lora_B"] for t in told)


class Asks(FedIT):
    name = "asks"
    asked: dict = {}  # noqa: RUF012

    def plan(self, state, client, plan):
        return replace(super().plan(state, client, plan), **self.asked)


class Folds(FedIT):
    name = "folds"

    def refactor(self, state, stats):
        new = super().refactor(state, stats)
        pairs = {
            layer.name: (torch.ones(layer.out, 1), torch.ones(1, layer.inp))
            for layer in state.spec.layers
        }
        return replace(new, tensors=add_fold(new.tensors, new.spec, new.round, pairs))


class Controls(FedIT):
    name = "controls"

    def broadcast(self, state, client):
        start = super().broadcast(state, client)
        return replace(start, control=dict(start.adapter.tensors))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"kept": ("B",)}, "keeps a part of the adapter to itself"),
        ({"fresh": 5}, "draws factors from a seed"),
        ({"rates": {"B": 16.0}}, "has a learning rate for each factor"),
        ({"proximal": 0.1}, "adds a penalty to its loss"),
        ({"tail_weight": 0.1}, "adds a penalty to its loss"),
        ({"control": True}, "corrects its gradients by control variates"),
        ({"slots": 3}, "chooses rank slots to train"),
        ({"rank": 1}, "trains another rank than it holds"),
        ({"local_steps": 3}, "obeys local_steps"),
    ],
)
def test_a_strategy_that_asks_more_of_clients_is_refused(asked, why):
    kind = type("Asks", (Asks,), {"asked": asked})
    with pytest.raises(ConfigError, match=f"'asks' needs a client that {why}.*; choose fedit"):
        as_flower(kind)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Folds, "adds a low-rank change to its frozen base"), (Controls, "corrects its gradients")],
)
def test_folds_and_control_variates_are_refused_before_any_round(kind, why):
    with pytest.raises(ConfigError, match=why):
        as_flower(kind(METHODS["lora"]))


@pytest.mark.parametrize("name", BOUND)
def test_strategies_that_need_fedloras_clients_are_refused(name):
    with pytest.raises(ConfigError, match=f"'{name}' {BOUND[name]}"):
        as_flower(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "fedti"}, "fedti.*is not known"),
        ({"strategy": "flwr:FedAdam"}, "Flower's own"),
        ({"strategy": FedIT(METHODS["dora"])}, "made for method 'dora'"),
        ({"strategy": FedIT(METHODS["lora"]), "options": {"a": 1}}, "this one has its own"),
        ({"strategy": "fedit", "options": {"a": 1}}, "strategy_options.a is not known"),
    ],
)
def test_what_cannot_be_an_app_says_why(arguments, message):
    with pytest.raises(ConfigError, match=message):
        as_flower(**arguments)


@pytest.mark.parametrize(
    ("shapes", "rank", "message"),
    [
        ({"w": (2, 2)}, None, "none of the 1 initial arrays is a LoRA factor"),
        ({"q.A": (2, 3)}, None, "none of the 1 initial arrays"),
        ({"q.A": (2, 3), "q.B": (4, 2)}, 3, r"layer q have shapes \(2, 3\) and \(4, 2\); .*\(3, k"),
        ({"q.A": (2, 3), "q.B": (4, 3)}, None, r"expected \(2, k\) and \(d, 2\)"),
        ({"q.lora_A.weight": (2, 3)}, None, r"have shapes \(2, 3\) and \(\)"),
        ({"q.lora_A.weight": (2, 3, 1, 1), "q.lora_B.weight": (4, 2, 1, 1)}, None, "expected"),
        (
            {"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2), "q.lora_magnitude_vector": (4,)},
            None,
            "q.lora_magnitude_vector belongs to a variant of LoRA",
        ),
        (
            {
                "q.lora_A.one.weight": (2, 3),
                "q.lora_B.one.weight": (4, 2),
                "q.lora_A.two.weight": (2, 3),
                "q.lora_B.two.weight": (4, 2),
            },
            None,
            "q.lora_A.two.weight and another are both q.A",
        ),
    ],
)
def test_arrays_that_are_no_lora_adapter_are_refused(shapes, rank, message, clients):
    initial = {key: torch.ones(shape) for key, shape in shapes.items()}
    with pytest.raises(ConfigError, match=message):
        start(as_flower("fedit", rank=rank), clients, 1, initial=initial)


def test_arrays_of_another_dtype_are_refused(clients):
    initial = {k: t.half() for k, t in clients.initial.items()}
    with pytest.raises(ConfigError, match=r"has dtype torch\.float16; expected float32"):
        start(as_flower("fedit"), clients, 1, initial=initial)


def test_rounds_begin_with_configure_train():
    with pytest.raises(StrategyError, match="before configure_train"):
        as_flower("fedit").aggregate_train(1, [])
