"""The merging benchmark: its own factor mean, its figures, and its page."""

import json

import pytest
import torch
from PIL import Image
from scipy import stats

from benchmarks.merging.contenders import (
    BASELINE,
    CONTENDERS,
    Contender,
    agreement,
    collect_grams,
    distance_from_mean,
    factor_mean,
)
from benchmarks.merging.run import best, measure, references
from benchmarks.merging.tabulate import TUNED_BASELINE, ceiling, compare, write
from benchmarks.merging.train import CASES, Bench
from benchmarks.vision import prepare as preparing
from benchmarks.vision.prepare import DOMAINS, prepare
from fedlora.merging.merge import Recipe, merge_sources, normalise
from fedlora.merging.options import make_merger


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merging")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "STEPS", 3)
        return Bench(prepare(folder, 0), 0)


@pytest.fixture(scope="module")
def adapters(bench, tmp_path_factory):
    """Case -> sources, after a single step of training."""
    folder = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.merging.train.STEPS", 1)
        return {name: bench.adapters(folder, case) for name, case in CASES.items()}


def dense(source):
    return torch.cat([(b @ a).flatten() for b, a in source.changes.values()])


def test_adapters_have_their_ranks_and_starts(adapters):
    for name, case in CASES.items():
        assert [source.spec.rank for source in adapters[name]] == list(case.ranks.values())
        assert {layer.scale for source in adapters[name] for layer in source.spec.layers} == {2.0}
        assert all(float(dense(source).norm()) > 0 for source in adapters[name])
    # a step of Adam at 5e-3 moves no entry further; rows of different draws lie far apart
    for name, near in (("shared", True), ("own", False)):
        first, second = (next(iter(source.changes.values()))[1] for source in adapters[name][:2])
        assert (float((first - second).abs().max()) <= 0.0101) is near


def test_the_factor_mean_is_fedex_lora_without_room_for_a_residual(adapters):
    for name, rank in (("own", 4), ("unequal", 8)):
        sources = adapters[name]
        recipe = Recipe(
            "fedex-lora", make_merger("fedex-lora", {}), normalise(None, len(sources)), rank
        )
        merged = merge_sources(sources, recipe)
        for layer, (left, right) in factor_mean(sources).items():
            expected = merged.tensors[f"{layer}.B"] @ merged.tensors[f"{layer}.A"]
            torch.testing.assert_close((left @ right).float(), expected)


def test_distance_and_agreement_are_those_of_dense_vectors(adapters):
    sources = adapters["unequal"]
    vectors = torch.stack([dense(source) for source in sources])
    mean = vectors.mean(0)
    changes = factor_mean(sources)
    off = torch.cat([(b @ a).flatten() for b, a in changes.values()]) - mean
    expected = float(off.norm() / mean.norm())
    assert distance_from_mean(changes, sources) == pytest.approx(expected, rel=1e-9)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    pairs = torch.combinations(torch.arange(len(unit)))
    cosines = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)
    assert agreement(sources) == pytest.approx(float(cosines.mean()), rel=1e-9)


def test_an_adapter_merged_with_itself_scores_as_before(bench, adapters):
    source = adapters["own"][0]
    bench.hold(source.spec, source.tensors)
    alone = bench.accuracies()
    for contender in (CONTENDERS[0], Contender("factor mean", None)):
        changes = contender.merge([source, source], {}, (), 0)
        bench.hold_change(changes)
        # a picture may sit on the border between two digits
        assert bench.accuracies() == pytest.approx(alone, abs=2 / 397)


def test_grams_are_second_moments_of_the_inputs(bench, adapters):
    source = adapters["own"][0]
    bench.hold(source.spec, source.tensors)
    adapted = bench.loaded.adapted
    examples = bench.loaded.data.test[:3]
    grams = collect_grams(adapted, examples)
    assert grams.keys() == source.changes.keys()
    inputs = []
    name, layer = next(iter(adapted.layers.items()))
    hook = layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        for example in examples:
            adapted.model(**{key: value[None] for key, value in example.inputs.items()})
    hook.remove()
    rows = torch.cat(inputs).flatten(0, -2).double()
    expected = sum(torch.outer(row, row) for row in rows) / len(rows)
    torch.testing.assert_close(grams[name], expected, rtol=1e-4, atol=1e-5)


def test_a_factor_multiplies_the_change(bench, adapters):
    (contender,) = [c for c in CONTENDERS if c.label == TUNED_BASELINE]
    plain = Contender("x", "task-arithmetic", factors=contender.grid["scaling"])
    scaled = measure(bench, adapters["own"], (), contender, list(contender.variants())[-2:])
    times = measure(bench, adapters["own"], (), plain, list(plain.variants())[-2:])
    for one, other in zip(scaled, times, strict=True):
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=2 / 397)
        assert one["distance"] == pytest.approx(other["distance"], abs=1e-6)
        assert one["rank"] == 24
    found = references(bench, CASES["own"], adapters["own"])
    assert list(found["singles"]) == list(DOMAINS)
    assert best(scaled, TUNED_BASELINE) in [line["variant"] for line in scaled]


def test_labels_and_variants_are_unique():
    assert len({contender.label for contender in CONTENDERS}) == len(CONTENDERS)
    for contender in CONTENDERS:
        variants = [str(variant) for variant in contender.variants()]
        assert len(set(variants)) == len(variants)


SCORES = (0.50, 0.52, 0.47)
GAINS = (0.01, 0.03, 0.02)


def toy():
    entries = {}
    for seed, (score, gain) in enumerate(zip(SCORES, GAINS, strict=True)):
        lines = [
            {
                "contender": contender.label,
                "variant": "",
                "accuracy": score if contender.label == BASELINE else score + gain,
                "rank": 4,
                "bytes": 4000,
                "distance": 0.5,
                "seconds": 0.01,
            }
            for contender in CONTENDERS
        ]
        own = {a: {b: 0.9 if a == b else 0.3 for b in DOMAINS} for a in DOMAINS}
        base = dict.fromkeys(DOMAINS, 0.4)
        entries[str(seed)] = {
            "lines": lines,
            "singles": own,
            "base": base,
            "cosine": 0.1,
            "commit": "abc",
        }
    return entries


def test_differences_are_paired_by_seed():
    found = compare(toy(), "flexlora", BASELINE)
    values = [score + gain for score, gain in zip(SCORES, GAINS, strict=True)]
    interval = stats.ttest_rel(values, SCORES).confidence_interval(0.95)
    assert found.mean == pytest.approx(2.0)
    assert (found.low, found.high) == pytest.approx((100 * interval.low, 100 * interval.high))
    assert ceiling(toy()["0"]) == pytest.approx(90.0)


def test_the_page_and_its_picture(tmp_path):
    path = tmp_path / "merging.json"
    found = {"seeds": dict.fromkeys(CASES, toy()), "machine": {"threads": 1}}
    path.write_text(json.dumps({**found, "steps": 1, "rate": 0.1}))
    path.with_name("merging.findings.md").write_text("What people say.\n")
    text = write(path)
    assert path.with_suffix(".md").read_text() == text
    assert "| flexlora |  | 51.7 | 3.1 | +2.0 | -0.5 to +4.5 |" in text
    assert "What people say." in text
    assert path.with_suffix(".png").stat().st_size < 150_000
    assert Image.open(path.with_suffix(".png")).size[0] > 600


def test_the_best_variant_is_the_first_of_equals():
    lines = [
        {"contender": "a", "variant": name, "accuracy": score}
        for name, score in (("x", 0.1), ("y", 0.3), ("z", 0.3))
    ]
    assert best([*lines, {"contender": "b", "variant": "w", "accuracy": 1.0}], "a") == "y"
