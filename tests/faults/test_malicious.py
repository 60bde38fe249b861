"""Three of ten clients send what no honest client sends: the others' aggregate is untouched.

Oracle: the run of the seven others alone, bit for bit.
"""

import json
import math
import random
from dataclasses import replace
from itertools import cycle

import pytest
import torch

from fedlora.adapter import AdapterState
from fedlora.messages import ClientUpdate
from fedlora.wire import encode_json, encode_tensors, encode_update, sha256
from tests.server.toy import Run, ToyLink

CROWD = [f"client-{place}" for place in range(10)]
ROUNDS = 3
# every way below is used at least once
SEEDS = range(12)


def with_tensors(reply, tensors):
    payload = encode_tensors(tensors)
    return with_payload(reply, payload)


def with_payload(reply, payload, **fields):
    value = {**json.loads(reply.manifest), "size_bytes": len(payload), "sha256": sha256(payload)}
    return replace(reply, manifest=encode_json({**value, **fields}), payload=payload)


def with_fields(reply, **fields):
    return with_payload(reply, reply.payload, **fields)


def filled(value):
    def change(reply, delta, past):
        return with_tensors(reply, {k: torch.full_like(v, value) for k, v in delta.items()})

    return change


def one_number(value):
    def change(reply, delta, past):
        name = sorted(delta)[-1]
        tensor = delta[name].clone()
        tensor.view(-1)[-1] = value
        return with_tensors(reply, {**delta, name: tensor})

    return change


def raw_examples(text):
    """A claim of examples that JSON as we write it does not hold."""

    def change(reply, delta, past):
        manifest = with_fields(reply, num_examples=12345).manifest
        return replace(reply, manifest=manifest.replace(b"12345", text))

    return change


def examples(value):
    return lambda reply, delta, past: with_fields(reply, num_examples=value)


def changed(change):
    """One factor of the layer p, changed; which of them are sent depends on the strategy."""

    def twist(reply, delta, past):
        name = max(name for name in delta if name.startswith("p."))
        return with_tensors(reply, {**delta, name: change(delta[name])})

    return twist


WAYS = {
    "NaN": one_number(math.nan),
    "infinity": one_number(math.inf),
    "minus infinity": one_number(-math.inf),
    "1e30": one_number(1e30),
    "a huge norm": filled(1e6),
    "a transposed tensor": changed(lambda tensor: tensor.T.contiguous()),
    "a wrong shape": changed(lambda tensor: tensor.reshape(-1)),
    "a wrong rank": changed(lambda tensor: tensor[:1, :1]),
    "float64": lambda r, d, past: with_tensors(r, {k: v.double() for k, v in d.items()}),
    "bfloat16": lambda r, d, past: with_tensors(r, {k: v.bfloat16() for k, v in d.items()}),
    "int32": lambda r, d, past: with_payload(r, r.payload.replace(b'"F32"', b'"I32"')),
    "an extra tensor": lambda r, d, past: with_tensors(r, {**d, "p.C": torch.zeros(1)}),
    "a missing tensor": lambda r, d, past: with_tensors(r, {k: d[k] for k in sorted(d)[1:]}),
    "another base": lambda r, d, past: with_fields(r, base_fingerprint="another"),
    "another adapter": lambda r, d, past: with_fields(r, spec="0" * 64),
    "another start": lambda r, d, past: with_fields(r, start_sha256="0" * 64),
    "another run": lambda r, d, past: with_fields(r, run="another"),
    "the round before": lambda r, d, past: with_fields(r, round=past["round"] - 1),
    "the attempt after": lambda r, d, past: with_fields(r, attempt=1),
    "another's name": lambda r, d, past: with_fields(r, client=CROWD[0]),
    "-1 examples": examples(-1),
    "0 examples": examples(0),
    "1e15 examples": examples(1e15),
    "NaN examples": raw_examples(b"NaN"),
    "1e400 examples": raw_examples(b"1e400"),
    "a word for examples": examples("many"),
    "a wrong digest": lambda r, d, past: replace(r, payload=r.payload[::-1]),
    "half a payload": lambda r, d, past: replace(r, payload=r.payload[: len(r.payload) // 2]),
    "no payload": lambda r, d, past: with_payload(r, b""),
    "ten payloads": lambda r, d, past: with_payload(r, r.payload * 10),
    "a header of 100 MB": lambda r, d, past: with_payload(
        r, (100_000_000).to_bytes(8, "little") + r.payload[8:]
    ),
    "noise for a manifest": lambda r, d, past: replace(r, manifest=b"\xff\x00" * 50),
    "a deep manifest": lambda r, d, past: replace(r, manifest=b"[" * 60_000),
    "a replay of round 1": lambda r, d, past: past["first"] or with_fields(r, round=9),
    "an error": lambda r, d, past: replace(r, manifest=b"", payload=b"", error="x" * 999),
}


class Crowd(ToyLink):
    """Ten clients; `hostile` says in which ways some of them lie."""

    def __init__(self, spec, hostile):
        super().__init__(spec, dict.fromkeys(CROWD, 2))
        self.hostile = hostile
        self.sent = {}
        self.firsts = {}
        self.twist = self.lie

    def lie(self, reply, plan):
        update = self.sent[plan.client]
        past = {"round": plan.round, "first": self.firsts.get(plan.client)}
        self.firsts.setdefault(plan.client, reply)
        ways = self.hostile.get(plan.client)
        if not ways:
            return [reply]
        return [WAYS[next(ways)](reply, dict(update.delta.tensors), past)]

    def answer(self, task, parts):
        self.change = lambda update: self.sent.setdefault(update.client, update) and update
        self.sent.pop(task.client, None)
        return super().answer(task, parts)


def crowd(folder, hostile, strategy="fedit"):
    run = Run(folder, strategy, rounds=ROUNDS, quorum=7)
    run.link = Crowd(run.spec, hostile)
    return run


@pytest.mark.parametrize(
    "strategy",
    [
        "fedit",
        "rolora",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("ffa-lora", "flexlora", "fedex-lora", "flora", "lora-fair")
        ),
    ],
)
def test_thirty_percent_that_send_nonsense_change_no_bit(tmp_path, strategy):
    """Every way of `WAYS`, three clients at a time, another way in each round."""
    ways = cycle(WAYS)
    used = set()
    for seed in SEEDS:
        bad = random.Random(seed).sample(CROWD[1:], 3)
        own = {name: [next(ways) for _ in range(ROUNDS)] for name in bad}
        used.update(way for ways_of_one in own.values() for way in ways_of_one)
        attacked = crowd(
            tmp_path / f"attacked{seed}", {k: iter(v) for k, v in own.items()}, strategy
        )
        alone = crowd(tmp_path / f"alone{seed}", {}, strategy)
        for name in bad:
            alone.link.ranks.pop(name)
        attacked.go()
        alone.go()
        rounds = list(zip(attacked.rounds(), alone.rounds(), strict=True))
        assert len(rounds) == ROUNDS
        for one, other in rounds:
            assert one["adapter_sha256"] == other["adapter_sha256"], own
            assert one["clients"] == other["clients"] == sorted(set(CROWD) - set(bad))
            assert one["rejected"] == 3
        rejected = [event for event in attacked.events if event["event"] == "rejected"]
        assert {event["client"] for event in rejected} == set(bad)
        assert all(event["code"].isupper() and event["detail"] for event in rejected)
        for run in (attacked, alone):
            run.store.close()
    assert used == set(WAYS)


def test_a_zero_update_is_accepted_and_counts(tmp_path):
    run = crowd(tmp_path / "run", {})
    honest = run.link.answer

    def zero(update: ClientUpdate) -> ClientUpdate:
        if update.client != CROWD[3]:
            return update
        zeros = {k: torch.zeros_like(v) for k, v in update.delta.tensors.items()}
        return replace(update, delta=AdapterState(update.delta.spec, zeros))

    def answer(task, parts):
        reply = honest(task, parts)
        manifest, payload = encode_update(zero(run.link.sent[task.client]))
        return replace(reply, manifest=manifest, payload=payload)

    run.link.answer = answer
    run.go()
    assert all(event["clients"] == CROWD for event in run.rounds())
    assert not [event for event in run.events if event["event"] == "rejected"]
    run.store.close()


def test_the_most_examples_a_client_may_claim_bound_its_weight(tmp_path):
    """Influence is at most w_max / sum of w: the mean with that weight, and no more."""
    most = 1e7
    run = crowd(tmp_path / "run", {})
    run.link.twist = lambda reply, plan: [
        with_fields(reply, num_examples=most) if plan.client == CROWD[3] else reply
    ]
    start = run.store.load().tensors
    state = run.go(until=1)
    sent = run.link.sent
    weights = {name: most if name == CROWD[3] else sent[name].num_examples for name in CROWD}
    for name, tensor in state.tensors.items():
        mean = sum(
            weights[client] * (start[name].double() + sent[client].delta.tensors[name].double())
            for client in CROWD
        ) / sum(weights.values())
        torch.testing.assert_close(tensor, mean.float())
    run.store.close()
