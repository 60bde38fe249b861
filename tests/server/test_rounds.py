"""The round loop: what a reply, a plug-in or the disk can do to a run, and what it cannot."""

import errno
import os
from dataclasses import replace

import pytest
import torch

import fedlora.server.spool
from fedlora.adapter import AdapterState, tensors_digest
from fedlora.errors import QuorumFailed, RunFailed, StorageError, StrategyError
from fedlora.server.link import Reply
from fedlora.strategies import STRATEGIES
from fedlora.strategies.fedit import FedIT
from tests.server.toy import NAMES, Run

MIXED = (4, 1, 2, 3)


@pytest.fixture
def make(tmp_path):
    made = []

    def make_run(*args, **settings):
        made.append(Run(tmp_path / f"run{len(made)}", *args, **settings))
        return made[-1]

    yield make_run
    for run in made:
        run.store.close()


def adapters(run):
    return [event["adapter_sha256"] for event in run.rounds()]


def standing(run):
    """The round the folder stands at."""
    return run.store.load().round


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_of_arrival_changes_no_bit(make, strategy):
    ranks = MIXED if STRATEGIES[strategy].hetero_rank else None
    runs = [make(strategy, ranks=ranks) for _ in range(3)]
    runs[1].link.order = lambda tasks: sorted(tasks, key=lambda t: t.client, reverse=True)
    runs[2].link.order = lambda tasks: [
        sorted(tasks, key=lambda t: t.client)[i] for i in (2, 0, 3, 1)
    ]
    states = [run.go() for run in runs]
    assert adapters(runs[0]) == adapters(runs[1]) == adapters(runs[2])
    assert len(set(adapters(runs[0]))) == 3
    for state in states:
        assert all(torch.equal(state.tensors[k], v) for k, v in states[0].tensors.items())
    files = [run.store.folder / "rounds/0003/global.safetensors" for run in runs]
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_in_pieces_equals_a_run_in_one(make, strategy):
    whole, pieces = make(strategy, rounds=4), make(strategy, rounds=4)
    whole.go()
    for until in (1, 2, 4):
        pieces.go(until)
        assert standing(pieces) == until
    assert adapters(whole) == adapters(pieces)


def test_the_merge_equals_a_dense_mean_of_what_was_sent(make):
    """Through bytes, gate and spool: float64 mean of start + delta, rounded once."""
    run = make("fedit", rounds=1)
    seen = {}
    run.link.change = lambda update: seen.setdefault(update.client, update)
    start = run.store.load().tensors
    state = run.go()
    total = sum(update.num_examples for update in seen.values())
    for name, tensor in state.tensors.items():
        mean = sum(
            u.num_examples / total * (start[name].double() + u.delta.tensors[name].double())
            for u in seen.values()
        )
        torch.testing.assert_close(tensor, mean.float())
    assert run.rounds()[0]["clients"] == list(NAMES)


def test_a_second_reply_counts_for_nothing(make):
    clean, run = make(), make()
    clean.go()
    run.link.twist = lambda reply, plan: [reply, reply]
    run.go()
    assert adapters(run) == adapters(clean)
    codes = [e["code"] for e in run.events if e["event"] == "rejected"]
    assert codes == ["STALE"] * 12


def test_a_reply_of_somebody_else_counts_for_nothing(make):
    """A stranger, and a client that was chosen but speaks in another's name."""
    clean, run = make(), make()
    clean.go()
    run.link.twist = lambda reply, plan: [
        replace(reply, client="eve"),
        *([replace(reply, client="dan")] if plan.client == "ann" else []),
        reply,
    ]
    run.go()
    assert adapters(run) == adapters(clean)
    codes = {(e["client"], e["code"]) for e in run.events if e["event"] == "rejected"}
    assert codes == {("eve", "CLIENT"), ("dan", "CLIENT")}


@pytest.mark.parametrize("kind", ["error", "silent", "garbage", "nothing"])
def test_one_client_that_fails_leaves_the_mean_of_the_others(make, kind):
    """Bit for bit the round of the three others."""
    replies = {
        "error": lambda reply: [Reply(reply.client, b"", b"", 7, 1.0, "the loss is nan")],
        "silent": lambda reply: [Reply(reply.client, b"", b"", 7, 1.0)],
        "garbage": lambda reply: [replace(reply, payload=b"\0" * len(reply.payload))],
        "nothing": lambda reply: [],
    }
    run, clean = make(), make()
    run.link.twist = lambda reply, plan: replies[kind](reply) if plan.client == "bob" else [reply]
    clean.link.ranks.pop("bob")
    run.go()
    clean.go()
    assert adapters(run) == adapters(clean)
    for event in run.rounds():
        assert event["clients"] == ["ann", "cyd", "dan"]
        rejected = kind in ("error", "garbage")
        assert event["rejected"] == int(rejected)
        assert event["missing"] == ([] if rejected else ["bob"])
    codes = {e["code"] for e in run.events if e["event"] == "rejected"}
    assert codes == {"error": {"CLIENT_ERROR"}, "garbage": {"DIGEST"}}.get(kind, set())


@pytest.mark.parametrize("loss", [1.7e308, -1.7e308, 10**18])
def test_a_claimed_loss_cannot_end_a_run(make, loss):
    """Finite, but not after it was weighted; the record of a round holds no infinity."""
    run, clean = make(), make()
    run.link.change = lambda update: replace(update, metrics={"train_loss": loss})
    run.go()
    clean.go()
    assert adapters(run) == adapters(clean)
    assert standing(run) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_evaluation_that_is_not_finite_does_not_end_a_run(make, value):
    run = make()
    run.evaluate = lambda state, adapter: {"loss": value, "accuracy": 0.5}
    run.go()
    assert standing(run) == 3
    assert [event["eval"] for event in run.rounds()] == [{"accuracy": 0.5}] * 3


def test_clients_that_cancel_to_nothing_do_not_end_a_run(make):
    """An ideal mean of zero under a merge that is not: the relative error is infinite."""

    class Noisy(FedIT):
        name = "noisy"

        def refactor(self, state, stats):
            new = super().refactor(state, stats)
            return replace(new, tensors={k: torch.ones_like(v) for k, v in new.tensors.items()})

    run = make(Noisy, rounds=1)
    run.link.change = lambda update: replace(
        update,
        delta=AdapterState(update.delta.spec, {k: -start[k] for k in update.delta.tensors}),
    )
    start = run.store.load().tensors
    run.go()
    assert standing(run) == 1
    assert run.rounds()[0]["aggregation_error"] is None


def test_too_few_updates_stop_the_run_and_the_round_stands(make):
    run = make(retries=2)
    run.go(until=1)
    before = tensors_digest(run.store.load().tensors)
    run.link.twist = lambda reply, plan: [reply] if plan.client in ("ann", "bob") else []
    with pytest.raises(QuorumFailed, match=r"2 of 4 .* the quorum is 3; the run stands at round 1"):
        run.go()
    assert QuorumFailed.exit_code == 3
    abandoned = [e for e in run.events if e["event"] == "abandoned"]
    assert [(e["round"], e["attempt"]) for e in abandoned] == [(2, 0), (2, 1), (2, 2)]
    assert standing(run) == 1
    assert tensors_digest(run.store.load().tensors) == before
    assert not (run.store.folder / "spool.bin").exists()
    run.change_settings(quorum=2)
    run.go()
    assert standing(run) == 3


def test_a_round_is_tried_again_with_the_next_attempt(make):
    run = make(rounds=1)
    run.link.twist = lambda reply, plan: [reply] if plan.attempt else []
    run.go()
    assert standing(run) == 1
    assert [e["event"] for e in run.events] == ["abandoned", "round"]
    assert run.store.load().record["attempt"] == 1


def test_the_reasons_of_a_failed_round_are_told(make):
    run = make(rounds=1, retries=0)
    run.link.twist = lambda reply, plan: [Reply(reply.client, b"", b"", 7, 1.0, "no such column")]
    with pytest.raises(QuorumFailed, match="no such column"):
        run.go()
    rejected = [e for e in run.events if e["event"] == "rejected"]
    assert [(e["client"], e["code"]) for e in rejected] == [(n, "CLIENT_ERROR") for n in NAMES]


def test_quorum_is_two_thirds_rounded_up(make):
    for present, enough in ((NAMES[:2], False), (NAMES[:3], True)):
        run = make(rounds=1, retries=0)
        run.link.twist = lambda reply, plan: [reply] if plan.client in present else []  # noqa: B023
        if enough:
            run.go()
        else:
            with pytest.raises(QuorumFailed):
                run.go()


def test_chosen_clients_are_drawn_by_round_and_come_in_order(make):
    run = make(clients_per_round=2, rounds=6, quorum=2)
    run.go()
    chosen = [event["clients"] for event in run.rounds()]
    assert all(len(names) == 2 and names == sorted(names) for names in chosen)
    assert len({tuple(names) for names in chosen}) > 1
    again = make(clients_per_round=2, rounds=6, quorum=2)
    again.go()
    assert adapters(again) == adapters(run)


def broken(step):
    def fail(self, *args):
        raise ZeroDivisionError("oops")

    return type("Broken", (FedIT,), {"name": "broken", step: fail})


@pytest.mark.parametrize(
    "step",
    ["factors", "broadcast_key", "broadcast", "expect", "reduce", "refactor", "global_delta"],
)
def test_a_plug_in_that_raises_stops_the_run_with_its_name(make, step):
    run = make(broken(step))
    with pytest.raises(StrategyError, match=r"'broken'.*round 1.*ZeroDivisionError: oops"):
        run.go()
    assert standing(run) == 0


def test_a_plug_in_that_raises_late_leaves_the_rounds_before(make):
    class Late(FedIT):
        name = "late"

        def refactor(self, state, stats):
            return super().refactor(state, stats) if state.round < 2 else None

    run = make(Late)
    with pytest.raises(StrategyError, match="the run stands at round 2"):
        run.go()
    assert standing(run) == 2


RESULTS = {
    "not finite": lambda new: replace(new, tensors={k: v / 0.0 for k, v in new.tensors.items()}),
    "shape": lambda new: replace(new, tensors={k: v[:1] for k, v in new.tensors.items()}),
    "dtype torch.float64": lambda new: replace(
        new, tensors={k: v.double() for k, v in new.tensors.items()}
    ),
    "extra after refactor cannot be": lambda new: replace(new, extra={"seen": {1, 2}}),
    "extra after refactor is another": lambda new: replace(new, extra={"seen": {1: "x"}}),
    "returned round": lambda new: replace(new, round=new.round + 1),
    "lacks p.A": lambda new: replace(
        new, tensors={k: v for k, v in new.tensors.items() if k != "p.A"}
    ),
}


@pytest.mark.parametrize("message", RESULTS)
def test_a_plug_in_that_returns_nonsense_stops_the_run(make, message):
    class Odd(FedIT):
        name = "odd"

        def refactor(self, state, stats):
            return RESULTS[message](super().refactor(state, stats))

    run = make(Odd)
    with pytest.raises(StrategyError, match=message) as caught:
        run.go()
    assert isinstance(caught.value, RunFailed)
    assert standing(run) == 0


def test_a_plug_in_may_keep_tensors_of_its_own(make):
    """Momentum of the mean, written to the checkpoint and read back."""

    class Momentum(FedIT):
        name = "momentum"

        def refactor(self, state, stats):
            new = super().refactor(state, stats)
            kept = {
                f"velocity.{k}": v - state.tensors[k] + state.tensors.get(f"velocity.{k}", 0.0)
                for k, v in new.tensors.items()
                if not k.startswith("velocity.")
            }
            return replace(new, tensors={**new.tensors, **kept}, extra={"rounds": new.round})

        def global_delta(self, state):
            own = {k: v for k, v in state.tensors.items() if not k.startswith("velocity.")}
            return AdapterState(state.spec, own)

    whole, pieces = make(Momentum), make(Momentum)
    whole.go()
    pieces.go(1)
    state = pieces.go()
    assert state.extra == {"rounds": 3}
    assert adapters(whole) == adapters(pieces)
    assert sum(k.startswith("velocity.") for k in pieces.store.load().tensors) == 6


def test_a_full_disk_under_the_spool_leaves_the_round_before(make, monkeypatch):
    class FullDisk:
        def __init__(self, writes):
            self.writes = writes

        def __getattr__(self, name):
            return getattr(os, name)

        def pwrite(self, *args):
            self.writes -= 1
            if self.writes < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return os.pwrite(*args)

    run = make(rounds=2)
    run.go(until=1)
    for writes in range(4):
        monkeypatch.setattr(fedlora.server.spool, "os", FullDisk(writes))
        with pytest.raises(StorageError, match="No space left"):
            run.go()
        monkeypatch.undo()
        assert standing(run) == 1
        assert not (run.store.folder / "spool.bin").exists()
    run.go()
    clean = make(rounds=2)
    clean.go()
    assert adapters(run) == adapters(clean)


@pytest.mark.parametrize(
    ("least", "silent", "stands"), [(1, 1, True), (4, 1, False), (1, 2, False)]
)
def test_a_quorum_is_never_below_the_least(make, least, silent, stands):
    run = make(least=least, rounds=1, retries=0)
    run.link.twist = lambda reply, plan: [] if plan.client in sorted(NAMES)[:silent] else [reply]
    if stands:
        assert run.go().round == 1
    else:
        with pytest.raises(QuorumFailed):
            run.go()
