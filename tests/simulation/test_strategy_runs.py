"""Whole runs of the strategies that clients of unequal means or aims take part in."""

import json

import pytest
import torch

from fedlora.adapter import trained_shapes, with_rank
from fedlora.adapters.slots import indices
from fedlora.client.state import ClientState
from fedlora.server.admission import expected_size
from fedlora.strategies import STRATEGIES
from fedlora.wire import decode_broadcast, decode_own
from tests.simulation.runs import Run

# (d, k) = (16, 16) and (8, 16), twice each
D, K, LAYERS = 2 * (16 + 8), 2 * (16 + 16), 4
HEAD = 2 * 16
XS = {"method": "lora-xs"}
CASES = {
    "lora-lego": {"scenario": {"ranks": [4, 2, 3]}},
    "fed-sb": {"scenario": {"ranks": [4, 2, 3]}, "adapter": XS},
    "fedsa-lora": {},
    "hetlora": {"scenario": {"ranks": [4, 2, 3]}},
    "lora-a2": {"scenario": {"ranks": [4, 2, 1]}},
}
each = pytest.mark.parametrize("strategy", CASES)


@pytest.fixture
def make(make_job, tmp_path):
    def make_run(strategy, name="run", **sections):
        case = CASES[strategy]
        merged = {
            "adapter": {"rank": 4, "targets": ["q_proj", "k_proj"], **case.get("adapter", {})},
            "scenario": case.get("scenario", {}),
            "federation": {"strategy": strategy, "rounds": 4, **sections.pop("federation", {})},
        }
        return Run(make_job(**merged, **sections), tmp_path / name)

    return make_run


@each
def test_a_run_in_pieces_equals_a_run_in_one(make, strategy):
    """With clients that are away in some rounds, kept moments and a moving rate."""
    keep = "reset" if STRATEGIES[strategy].regauges else "keep"
    sections = {
        "partition": {"clients": 4},
        "training": {"schedule": "cosine", "optimizer_state": keep},
        "federation": {"clients_per_round": 3},
    }
    whole, pieces = (make(strategy, name, **sections) for name in ("whole", "pieces"))
    whole.go()
    for until in range(1, 5):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert len(set(whole.adapters())) == 4
    assert whole.file(4) == pieces.file(4)
    assert not whole.of("rejected")
    held = [sorted((run.folder / "clients").rglob("*.safetensors")) for run in (whole, pieces)]
    assert [p.read_bytes() for p in held[0]] == [p.read_bytes() for p in held[1]]


@each
def test_a_round_that_is_done_again_gives_the_same_bits(make, strategy):
    """A crash after the clients' work: their own state is a round ahead of the server's."""
    run = make(strategy)
    run.go()
    adapters, newest = run.adapters(), run.file(4)
    path = run.folder / "rounds" / "0004" / "global.safetensors"
    path.write_bytes(newest[:-1] + bytes([newest[-1] ^ 1]))
    run.go()
    assert run.of("fallback")
    assert run.adapters() == [*adapters, adapters[-1]]
    assert run.file(4) == newest


@each
def test_the_aggregation_error_is_as_claimed(make, strategy):
    run = make(strategy)
    run.go()
    errors = [event["aggregation_error"] for event in run.of("round")]
    if run.federation.strategy.personal:
        assert errors == [None] * 4
    elif run.federation.strategy.exact:
        assert max(errors) < 1e-5
    else:
        assert max(errors) > 1e-4


def numbers(payload):
    """How many float32 numbers a payload carries."""
    header = 8 + int.from_bytes(payload[:8], "little")
    return (len(payload) - header) / 4


UP = {
    "lora-lego": lambda rank, number: rank * (D + K) + HEAD,
    "fed-sb": lambda rank, number: LAYERS * rank**2 + HEAD,
    "fedsa-lora": lambda rank, number: rank * K,
    "hetlora": lambda rank, number: rank * (D + K) + HEAD,
}


@pytest.mark.parametrize("strategy", UP)
def test_bytes_up_are_those_of_the_closed_form(make, strategy):
    run = make(strategy)
    run.go()
    ranks = {c.name: c.rank for c in run.federation.scenario.clients}
    for number, replies in enumerate(run.tap.replies, 1):
        assert len(replies) == 3
        for reply in replies:
            assert numbers(reply.payload) == UP[strategy](ranks[reply.client], number)


def size(run, rank, *parts):
    """Bytes of the canonical files of these parts at a rank."""
    whole = trained_shapes(with_rank(run.federation.spec, rank), run.federation.method)
    heads = run.federation.spec.head_shapes
    return sum(
        expected_size(
            {
                k: v
                for k, v in whole.items()
                if (part == "heads" if k in heads else k.endswith(f".{part}"))
            }
        )
        for part in parts
    )


@pytest.mark.parametrize(
    ("strategy", "first", "later"),
    [
        ("lora-lego", "A B heads", "A B heads"),
        ("hetlora", "A B heads", "A B heads"),
        ("fed-sb", "R heads", "R heads"),
        # a client starts from the server's B and heads once, and then from its own
        ("fedsa-lora", "A B heads", "A"),
    ],
)
def test_bytes_down_are_those_of_what_changed(make, strategy, first, later):
    run = make(strategy)
    run.go()
    basis = run.federation.sent_basis
    once = expected_size({k: tuple(v.shape) for k, v in basis.items()}) if basis else 0
    ranks = {c.name: c.rank for c in run.federation.scenario.clients}
    for number, (tasks, replies) in enumerate(
        zip(run.tap.tasks, run.tap.replies, strict=True), start=1
    ):
        manifests = {task.client: len(task.manifest) for task in tasks}
        for reply in replies:
            parts = first if number == 1 else later
            expected = size(run, ranks[reply.client], *parts.split())
            found = reply.bytes_down - manifests[reply.client]
            assert found == expected + (once if number == 1 else 0)


def test_lora_a2_sends_its_budget_of_slots_and_nothing_else(make):
    """r_i per layer on average, d numbers for each in odd rounds and k in even ones."""
    run = make("lora-a2", training={"weight_decay": 0.1, "momentum": 0.9})
    run.go()
    ranks = {c.name: c.rank for c in run.federation.scenario.clients}
    layers = run.federation.spec.layers
    spread = set()
    for number, (tasks, replies) in enumerate(
        zip(run.tap.tasks, run.tap.replies, strict=True), start=1
    ):
        plans = {task.client: decode_broadcast(task.manifest).plan for task in tasks}
        for reply in replies:
            plan, rank = plans[reply.client], ranks[reply.client]
            assert (plan.rank, plan.rates) == (4, {"B": 5.0})
            assert plan.factors == (("B",) if number % 2 else ("A",))
            fields = json.loads(reply.manifest)
            if rank == 4:
                assert (plan.slots, fields["slots"]) == (0, None)
                assert numbers(reply.payload) == 4 * (D if number % 2 else K) + HEAD
                continue
            assert plan.slots == rank * LAYERS
            counts = [len(indices(int(mask, 16), 4)) for mask in fields["slots"]]
            assert sum(counts) == rank * LAYERS
            spread.add(tuple(counts))
            sizes = [layer.out if number % 2 else layer.inp for layer in layers]
            slots = sum(c * n for c, n in zip(counts, sizes, strict=True))
            assert numbers(reply.payload) == slots + HEAD
            assert fields["metrics"]["trial_steps"] >= 1
    # the budget holds over all layers together, not for each
    assert any(len(set(counts)) > 1 for counts in spread)


def test_lora_a2_leaves_the_other_slots_of_the_client_alone(make):
    """In the client's own model, bit for bit, under weight decay and kept moments."""
    run = make("lora-a2", training={"weight_decay": 0.5, "optimizer_state": "keep"})
    checked = []

    def work(federation):
        def one(client, manifest, fetch):
            plan = decode_broadcast(manifest).plan
            start = decode_own(run.file(plan.round - 1))
            update = federation._work(client, manifest, fetch)
            ended = federation.loaded.adapted.state().tensors
            if update.slots is not None:
                (factor,) = plan.factors
                for layer, mask in zip(federation.spec.layers, update.slots, strict=True):
                    name = f"{layer.name}.{factor}"
                    for slot in range(4):
                        pick = (slice(None), slot) if factor == "B" else slot
                        same = torch.equal(ended[name][pick], start[name][pick])
                        assert same == (slot not in indices(mask, 4))
                        checked.append(same)
            return update

        return one

    run.go(work=work)
    assert set(checked) == {True, False}


def test_lora_a2_with_every_slot_is_rolora(make):
    """The same bits, once the rates are the same."""
    a2 = make("lora-a2", "a2", federation={"strategy_options": {"rate_ratio": 1.0}})
    a2.job.scenario.ranks.clear()
    rolora = make("lora-a2", "rolora", federation={"strategy": "rolora"})
    rolora.job.scenario.ranks.clear()
    a2.go()
    rolora.go()
    assert a2.adapters() == rolora.adapters()


def test_own_parts_survive_rounds_without_the_client(make):
    """FedSA-LoRA with one client in turn: B and heads are those of its last round, bit for bit,
    whoever came between, and are never sent.
    """
    run = make("fedsa-lora", federation={"clients_per_round": 1, "rounds": 8})
    last = {}

    def work(federation):
        def one(client, manifest, fetch):
            update = federation._work(client, manifest, fetch)
            memory = ClientState(run.folder / "clients" / client)
            number = decode_broadcast(manifest).plan.round
            if client in last:
                before = memory.before(number)
                assert before.keys() == last[client].keys()
                assert all(torch.equal(before[k], last[client][k]) for k in before)
            last[client] = memory.before(number + 1)
            assert not torch.equal(
                last[client]["kept.score.weight"], run.loaded.initial.tensors["score.weight"]
            )
            assert all(name.endswith(".A") for name in update.delta.tensors)
            return update

        return one

    run.go(work=work)
    names = [replies[0].client for replies in run.tap.replies]
    came_back = [
        n for i, n in enumerate(names) if n in names[: max(0, i - 1)] and n != names[i - 1]
    ]
    assert came_back
    state = {k: v for k, v in last[names[0]].items() if k.endswith(".B")}
    assert len(state) == LAYERS
    assert any(bool(v.any()) for v in state.values())


def test_hetlora_prunes_a_client_whose_tail_shrinks_and_remembers_it(make):
    """A strong penalty empties the tail; the smaller rank is in the record and in the bytes."""
    run = make(
        "hetlora",
        federation={"rounds": 6, "strategy_options": {"penalty": 30.0, "gamma": 0.5}},
        training={"optimizer": "sgd", "learning_rate": 1e-2},
    )
    run.go(3)
    run.go(6)
    sent = {}
    for tasks in run.tap.tasks:
        for task in tasks:
            sent.setdefault(task.client, []).append(decode_broadcast(task.manifest).plan.rank)
    pruned = [e["notes"]["pruned"] for e in run.of("round") if "notes" in e]
    assert pruned
    for name, ranks in sent.items():
        assert ranks == sorted(ranks, reverse=True), name
    assert min(r for ranks in sent.values() for r in ranks) < 2
