"""The laws of `fedlora.strategies.conformance` hold for all that is in the tables, and bite."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from fedlora.adapters import METHODS
from fedlora.messages import Pair
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Stats
from fedlora.strategies.conformance import LAWS, federations, findings
from fedlora.strategies.fedit import FedIT
from fedlora.strategies.ffa_lora import FfaLora
from fedlora.strategies.rolora import RoLora
from fedlora.strategies.wrappers import WRAPPERS

# averaged as they are; one factor only; products re-factored; a fold beside the factors
INSIDE = ("fedit", "ffa-lora", "flexlora", "fedex-lora")
LORA = {"lora": METHODS["lora"]}
OTHER_METHODS = {name: method for name, method in METHODS.items() if name != "lora"}


def wrapped(wrapper, strategy, **options):
    return lambda traits: WRAPPERS[wrapper](STRATEGIES[strategy](traits), options)


def not_kept(made):
    """Law -> finding, of all laws that are not kept by one of these federations."""
    found = {}
    for federation in made:
        for finding in findings(federation):
            if finding.verdict != "kept":
                found.setdefault(finding.law.name, finding)
    return found


def told(found, verdict):
    return {name: finding.found for name, finding in found.items() if finding.verdict == verdict}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_the_laws(strategy):
    make = STRATEGIES[strategy]
    # the strategies for one method alone do not take lora
    made = federations(make, LORA) or federations(make, OTHER_METHODS)
    assert made
    found = [finding for federation in made for finding in findings(federation)]
    assert [f"{f.law.name}: {f.found}" for f in found if f.verdict == "broken"] == []
    assert len(found) >= 20 * len(made)


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_the_laws_hold_with_every_method(method):
    """Tried with the strategy that takes them all; the slow test tries every pair."""
    made = federations(STRATEGIES["fedit"], {method: METHODS[method]})
    assert made
    assert told(not_kept(made), "broken") == {}


@pytest.mark.slow
@pytest.mark.parametrize("method", OTHER_METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_the_laws_with_every_method(strategy, method):
    made = federations(STRATEGIES[strategy], {method: METHODS[method]})
    assert told(not_kept(made), "broken") == {}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_keeps_the_laws_but_for_those_it_waives(wrapper):
    made = [
        federation
        for strategy in INSIDE
        for federation in federations(wrapped(wrapper, strategy), LORA)[-1:]
    ]
    assert len(made) >= 2
    found = not_kept(made)
    assert told(found, "broken") == {}
    # a waiver that nothing needs would hide a mistake
    assert told(found, "waived").keys() == made[0].strategy().waives.keys()


@pytest.mark.parametrize(
    ("wrapper", "options", "waived"),
    [
        ("fedadam", {"beta1": 0.0}, {"alone", "heads", "same"}),
        ("fedadagrad", {"beta1": 0.5}, {"alone", "heads", "same", "still"}),
        ("fedmomentum", {"beta": 0.0, "eta": 0.5}, {"alone", "heads", "same"}),
        ("norm-cap", {"cap": 1.0}, {"alone", "heads", "same"}),
    ],
)
def test_options_decide_which_laws_a_wrapper_waives(wrapper, options, waived):
    found = not_kept(federations(wrapped(wrapper, "fedit", **options), LORA))
    assert told(found, "broken") == {}
    assert told(found, "waived").keys() == waived


@pytest.mark.parametrize("kind", [*STRATEGIES.values(), *WRAPPERS.values()])
def test_waivers_name_laws_that_may_be_waived_and_say_why(kind):
    waivable = {law.name for law in LAWS if law.waivable}
    assert kind.waives.keys() <= waivable
    assert all(len(reason.split()) >= 3 for reason in kind.waives.values())


def test_laws_have_names_of_their_own_and_explain_themselves():
    assert len({(law.name, law.meaning) for law in LAWS}) == len({law.name for law in LAWS})
    for law in LAWS:
        assert law.meaning.endswith(".")
        assert law.cause
        assert law.look


# Strategies with one mistake each; every one is killed by the law that is named.


class MutatesState(FedIT):
    def refactor(self, state, stats):
        for name, mean in stats.mean().items():
            state.tensors[name].copy_(mean)
        return self.advance(state, {})


class MutatesStart(FedIT):
    def reduce(self, state, updates):
        updates[0].begin.tensors["attn.q.A"].mul_(1.0)
        return super().reduce(state, updates)


class MutatesSums(FedIT):
    def refactor(self, state, stats):
        for total in stats.sums.values():
            total /= stats.weight
        return self.advance(state, {k: v.float() for k, v in stats.sums.items()})


class ForgetsWeights(FedIT):
    def reduce(self, state, updates):
        return super().reduce(state, [replace(u, weight=1.0) for u in updates])


class DividesByCount(FedIT):
    def reduce(self, state, updates):
        return replace(super().reduce(state, updates), weight=float(len(updates)))


class SwapsFactors(FedIT):
    """Where shapes allow it, which hides it from every check of shapes."""

    def refactor(self, state, stats):
        new = super().refactor(state, stats)
        tensors = dict(new.tensors)
        a, b = tensors["attn.q.A"], tensors["attn.q.B"]
        tensors |= {"attn.q.A": b.T.contiguous(), "attn.q.B": a.T.contiguous()}
        return replace(new, tensors=tensors)


class GlobalNoise(FedIT):
    def refactor(self, state, stats):
        new = super().refactor(state, stats)
        noisy = {k: v + 1e-9 * torch.randn_like(v) for k, v in new.tensors.items()}
        return replace(new, tensors=noisy)


class KeepsOnSelf(FedIT):
    before = None

    def refactor(self, state, stats):
        new = super().refactor(state, stats)
        tensors = dict(new.tensors)
        if self.before is not None:
            tensors = {k: v + 0.1 * self.before[k] for k, v in tensors.items()}
        self.before = tensors
        return replace(new, tensors=tensors)


class FormsProduct(RoLora):
    def refactor(self, state, stats):
        for layer in state.spec.layers:
            full = state.tensors[f"{layer.name}.B"] @ state.tensors[f"{layer.name}.A"]
            assert full.isfinite().all()
        return super().refactor(state, stats)


class WrongDtype(FedIT):
    def refactor(self, state, stats):
        return self.advance(state, dict(stats.mean()))


class MakesNaN(FedIT):
    """Divides by the change's norm, which is zero for a client that did not move."""

    def reduce(self, state, updates):
        norms = [sum(float(t.norm()) for t in update.delta.tensors.values()) for update in updates]
        scaled = [
            replace(u, weight=u.weight * (n / n if n else float("nan")))
            for u, n in zip(updates, norms, strict=True)
        ]
        return super().reduce(state, scaled)


class DropsHeads(FedIT):
    def reduce(self, state, updates):
        factors = [n for n in updates[0].delta.tensors if n not in state.spec.head_shapes]
        return Stats(self.sums(state, updates, factors), sum(u.weight for u in updates))


class FirstCountsTwice(FedIT):
    def reduce(self, state, updates):
        first, *rest = updates
        return super().reduce(state, [replace(first, weight=2 * first.weight), *rest])


class CountsRoundTwice(FedIT):
    def refactor(self, state, stats):
        new = super().refactor(state, stats)
        return replace(new, round=new.round + 1)


class Products(FedIT):
    """The mean product in place of A and B: exact while its rank fits, as in a single round."""

    scaled = True

    def reduce(self, state, updates):
        total = sum(u.weight for u in updates)
        return Stats(self.head_sums(state, updates), total, self.stacks(state, updates))

    def refactor(self, state, stats):
        tensors = {k: v.float() for k, v in stats.mean().items()}
        for layer in state.spec.layers:
            tensors |= self.factors_of(layer, stats.stacks[layer.name])
        return self.advance(state, tensors)

    def factors_of(self, layer, pair: Pair):
        u, s, vh = torch.linalg.svd(pair[0] @ pair[1], full_matrices=False)
        scale = layer.scale if self.scaled else 1.0
        r = layer.rank
        return {
            f"{layer.name}.B": (u[:, :r] * s[:r] / scale).float().contiguous(),
            f"{layer.name}.A": vh[:r].float().contiguous(),
        }


class IgnoresScale(Products):
    scaled = False


class ClaimsExact(FedIT):
    exact = True


class ClaimsLinear(FedIT):
    def reduce(self, state, updates):
        stats = super().reduce(state, updates)
        return Stats(dict(stats.mean()), 1.0)


class ClaimsRanks(FedIT):
    """Takes unequal ranks, and averages only the slots of the first client."""

    def check(self, given):
        pass


class ForgetsExtra(FedIT):
    """A velocity that is left out of the state from the second round on."""

    def __init__(self, *args):
        super().__init__(*args)
        self.velocity = {}

    def refactor(self, state, stats):
        new = super().refactor(state, stats)
        self.velocity[new.round] = {
            k: v - state.tensors[k] + 0.5 * self.velocity.get(state.round, {}).get(k, 0.0)
            for k, v in new.tensors.items()
        }
        moved = {k: state.tensors[k] + v for k, v in self.velocity[new.round].items()}
        return replace(new, tensors=moved)


class KeepsDeadSlots(RoLora):
    def refactor(self, state, stats):
        new = super().refactor(state, stats)
        dead = {k: v.clone() for k, v in new.tensors.items()}
        dead["mlp.up.A"][1] = 0.0
        dead["mlp.up.B"][:, 1] = 0.0
        return replace(new, tensors=dead)


class ResetsAtInit(FfaLora):
    def init(self, adapter):
        state = super().init(adapter)
        return replace(state, tensors={k: v * 0.0 for k, v in state.tensors.items()})


class ExpectsTooMuch(FfaLora):
    def expect(self, state, plan):
        return super().expect(state, replace(plan, factors=("A", "B")))


class TooHighRank(FfaLora):
    def rank(self, state, client):
        return state.spec.rank


class WaitsForAnn(FedIT):
    def reduce(self, state, updates):
        assert any(u.client == "ann" for u in updates), "ann is missing"
        return super().reduce(state, updates)


class UncutStart(FfaLora):
    def broadcast(self, state, client):
        return super().broadcast(state, replace(client, rank=state.spec.rank))


class NoDefaults(FedIT):
    privacy = ("record",)


class OptionsNotJson(FedIT):
    options: ClassVar = {"device": torch.device("cpu")}


class NameInStart(FedIT):
    def broadcast(self, state, client):
        start = super().broadcast(state, client)
        moved = {
            k: v + len(client.name) + ord(client.name[0]) for k, v in start.adapter.tensors.items()
        }
        return replace(start, adapter=replace(start.adapter, tensors=moved))


class Decays(FedIT):
    def refactor(self, state, stats):
        new = super().refactor(state, stats)
        return replace(new, tensors={k: 0.99 * v for k, v in new.tensors.items()})


class AddsOneToWeights(FedIT):
    def reduce(self, state, updates):
        return super().reduce(state, [replace(u, weight=u.weight + 1.0) for u in updates])


class CountsItself(FedIT):
    """The old adapter is one more client."""

    def refactor(self, state, stats):
        tensors = {
            k: ((t + state.tensors[k].double()) / (stats.weight + 1.0)).float()
            for k, t in stats.sums.items()
        }
        return self.advance(state, tensors)


class ShowsItsVelocity(FedIT):
    def refactor(self, state, stats):
        new = super().refactor(state, stats)
        kept = {f"velocity.{k}": v - state.tensors[k] for k, v in self.adapter(new).tensors.items()}
        return replace(new, tensors={**new.tensors, **kept})

    def global_delta(self, state):
        return replace(self.adapter(state), tensors=state.tensors)


class WaivesPurity(FedIT):
    waives: ClassVar = {"inputs": "it is faster that way"}


KILLED_BY = {
    WaivesPurity: "waivers",
    Decays: "still",
    AddsOneToWeights: "split",
    CountsItself: "alone",
    ShowsItsVelocity: "global-adapter",
    MutatesState: "inputs",
    MutatesStart: "inputs",
    MutatesSums: "inputs",
    ForgetsWeights: "zero-weight",
    DividesByCount: "weights",
    SwapsFactors: "same",
    GlobalNoise: "random",
    KeepsOnSelf: "deterministic",
    FormsProduct: "low-rank",
    WrongDtype: "next-state",
    MakesNaN: "idle",
    DropsHeads: "heads",
    FirstCountsTwice: "order",
    CountsRoundTwice: "next-state",
    IgnoresScale: "same",
    ClaimsExact: "exact",
    ClaimsLinear: "linear",
    ClaimsRanks: "ranks",
    ForgetsExtra: "resume",
    KeepsDeadSlots: "alive",
    ResetsAtInit: "init",
    ExpectsTooMuch: "expect",
    TooHighRank: "plan",
    WaitsForAnn: "absent",
    UncutStart: "broadcast",
    NoDefaults: "declared",
    OptionsNotJson: "declared",
    NameInStart: "broadcast",
}


@pytest.mark.parametrize("kind", KILLED_BY)
def test_a_mistake_is_found_by_its_law(kind):
    laws = [law for law in LAWS if law.name == KILLED_BY[kind]]
    verdicts = [f.verdict for made in federations(kind, LORA) for f in findings(made, laws)]
    assert "broken" in verdicts


def test_every_law_is_needed():
    assert {law.name for law in LAWS} == set(KILLED_BY.values())


def test_a_median_waives_the_laws_of_weights_and_no_other():
    class Median(FedIT):
        """Of each coordinate; counts clients, not their weights."""

        linear = False

        def reduce(self, state, updates):
            lifted = [self.lift(state.spec, update) for update in updates]
            return Stats(
                {k: torch.stack([t[k] for t in lifted]).median(0).values for k in lifted[0]}, 1.0
            )

    laws = {"split", "zero-weight", "heads"}
    made = federations(Median, LORA)
    assert told(not_kept(made), "broken").keys() == laws
    Median.waives = dict.fromkeys(laws, "counts clients, not weights")
    assert told(not_kept(made), "broken") == {}
    assert told(not_kept(made), "waived").keys() == laws
