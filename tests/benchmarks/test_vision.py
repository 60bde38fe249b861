"""The vision benchmark: its data, its results file, and the statistics of its tables."""

import io
import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from sklearn.datasets import load_digits

from benchmarks.vision import prepare as preparing
from benchmarks.vision.prepare import DOMAINS, prepare, split, transform
from benchmarks.vision.run import Results, area, best_rate, campaign
from benchmarks.vision.settings import SETTINGS, Arm, Setting, make_job
from benchmarks.vision.tabulate import Row, differences, estimate, main, scored, tables
from fedlora.models.loaded import load


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "STEPS", 3)
        prepare(folder, 0)
    return folder


def job_of(work, name, arm="fedit"):
    return make_job(SETTINGS[name], Arm.parse(arm), work / "seed0", rate=0.1, seed=0)


# data


def test_no_digit_is_in_two_parts():
    parts = split(0)
    assert [len(part) for part in parts] == [700, 700, 397]
    assert sorted(torch.cat(parts).tolist()) == list(range(1797))
    assert all(torch.equal(a, b) for a, b in zip(parts, split(0), strict=True))
    assert not torch.equal(parts[0], split(1)[0])


def test_every_domain_shows_all_digits_of_its_part(work):
    digits = load_digits()
    _, pool, test = split(0)
    for name, numbers in (("train", pool), ("test", test)):
        rows = pq.read_table(work / "seed0" / f"{name}.parquet").to_pylist()
        assert [row["domain"] for row in rows] == [d for d in DOMAINS for _ in numbers]
        labels = [str(label) for label in digits.target[numbers.numpy()]]
        assert [row["label"] for row in rows] == labels * len(DOMAINS)
        inverted = [row for row in rows if row["domain"] == "invert"]
        found = [np.asarray(Image.open(io.BytesIO(row["image"]))) for row in inverted]
        expected = 0.6 * (255 - 255 * digits.images[numbers.numpy()] / 16)
        assert np.abs(np.stack(found) - expected).max() <= 0.5 + 1e-4


def test_two_clients_share_a_domain_unevenly(work):
    rows = pq.read_table(work / "seed0" / "train.parquet").to_pylist()
    sizes = Counter(row["client"] for row in rows)
    assert sorted(sizes) == [f"{domain}-{i}" for domain in DOMAINS for i in (0, 1)]
    assert min(sizes.values()) >= 32
    for row in rows:
        assert row["client"].startswith(row["domain"])
    # a draw at 0.3 gives most classes mainly to one of the two; halves would give 0.5
    cells = Counter((row["client"], row["label"]) for row in rows)
    of_class = Counter((row["domain"], row["label"]) for row in rows)
    larger = [
        max(cells[f"{domain}-{i}", label] for i in (0, 1)) / count
        for (domain, label), count in of_class.items()
    ]
    assert np.mean(larger) > 0.7


def test_transforms_are_mirror_images_and_move_ink():
    digits = torch.tensor(load_digits().images[:50], dtype=torch.float32) / 16
    left, right = transform(digits.flip(-1), "rotate-left"), transform(digits, "rotate-right")
    torch.testing.assert_close(left, right.flip(-1))
    torch.testing.assert_close(
        transform(digits.flip(-2), "zoom"), transform(digits, "zoom").flip(-2)
    )
    # a bar upright in the middle leans to the left at the top
    bar = torch.zeros(1, 8, 8)
    bar[0, :, 3:5] = 1
    leaning = transform(bar, "rotate-left")[0]
    assert leaning[1].argmax() < leaning[6].argmax()
    # ink clear of the borders moves by 0.28 of half a side, 1.12 pixels, right and down
    spot = torch.zeros(1, 8, 8)
    spot[0, 2:4, 2:5] = 1
    places = torch.arange(8.0)
    moved = transform(spot, "shift")[0]
    for dim in (0, 1):
        before = (spot[0].sum(dim) * places).sum() / spot.sum()
        after = (moved.sum(dim) * places).sum() / moved.sum()
        assert float(after - before) == pytest.approx(1.12, abs=1e-4)


# jobs


def test_jobs_keep_the_pretrained_head_and_train_factors_only(work):
    loaded = load(job_of(work, "V1"))
    weights = load_file(work / "seed0" / "model" / "model.safetensors")
    for name in ("weight", "bias"):
        assert torch.equal(
            loaded.base.model.classifier.get_parameter(name), weights[f"classifier.{name}"]
        )
    spec = loaded.initial.spec
    assert (spec.heads, len(spec.layers)) == ((), 12)
    assert {layer.scale for layer in spec.layers} == {2.0}
    assert sorted(loaded.data.clients) == sorted(DOMAINS)
    assert {len(client.train) for client in loaded.data.clients.values()} == {699}
    assert len(loaded.data.test) == 6 * 397


def test_unequal_ranks_share_one_scale(work):
    job = job_of(work, "V3", "ffa-lora")
    assert (job.adapter.rank, job.adapter.alpha) == (8, 16.0)
    assert job.scenario.ranks == [2, 2, 4, 4, 8, 8]


def test_arms_are_read_as_they_are_written():
    text = 'lora-fair:init="mean";ridge=0.5+multi-krum'
    arm = Arm.parse(text)
    assert (arm.strategy, arm.wrappers) == ("lora-fair", ("multi-krum",))
    assert arm.options == {"init": "mean", "ridge": 0.5}
    assert arm.label == text
    assert Arm.parse("fedit").label == "fedit"


# runs


def test_a_campaign_runs_once_and_goes_on(work, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    setting = Setting("client", steps=1, rounds=2, every=1, chosen=3)
    runs = [(Arm("fedit"), 0.1), (Arm("ffa-lora"), 0.1)]
    campaign(results, work, "V2", setting, runs[:1], 0, 1)
    first = results.lines()
    campaign(results, work, "V2", setting, runs, 0, 1)
    assert results.lines()[:1] == first
    assert [line["arm"] for line in results.lines()] == ["fedit", "ffa-lora"]
    for line in results.lines():
        assert list(line["domains"]) == sorted(DOMAINS)
        assert [point[0] for point in line["curve"]] == [0, 1, 2]
        # equal parts of the test: the mean over domains is the accuracy on all of it
        assert line["accuracy"] == pytest.approx(line["curve"][-1][1], abs=1e-5)
    # nothing of the first run is left in the shared model
    assert results.lines()[0]["curve"][0] == results.lines()[1]["curve"][0]


def test_a_diverged_run_has_no_accuracy(work, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    setting = Setting("domain", steps=4, rounds=2, every=1)
    campaign(results, work, "V1", setting, [(Arm("fedit"), 1e30)], 0, 1)
    (line,) = results.lines()
    assert (line["accuracy"], line["auc"]) == (None, None)
    assert "round 1" in line["failed"]
    assert results.has("V1", "fedit", 1e30, 0)


def test_half_a_line_is_not_a_run(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.append(toy_line("fedit", 0, 0.5))
    with results.path.open("a") as file:
        file.write('{"setting": "V1", "arm"')
    results.append(toy_line("fedit", 1, 0.6))
    assert [line["seed"] for line in results.lines()] == [0, 1]


def test_the_best_rate_is_that_of_the_tuning_seeds():
    assert best_rate([], "V1", "fedit") is None
    lines = [
        toy_line("fedit", 100, accuracy, rate)
        for rate, accuracy in ((0.03, 0.4), (0.1, 0.6), (0.3, None))
    ]
    lines.append(toy_line("fedit", 0, 0.9, 0.03))
    assert best_rate(lines, "V1", "fedit") == 0.1
    # a second seed for all rates but one, which then no longer counts; failed is 0
    lines += [toy_line("fedit", 101, 0.7, 0.03), toy_line("fedit", 101, 0.8, 0.3)]
    assert best_rate(lines, "V1", "fedit") == 0.03


def test_differences_are_to_fedit_at_its_tuned_rate():
    lines = [toy_line("fedit", 0, 0.5), toy_line("fedit", 0, 0.6, 0.3), toy_line("other", 0, 0.7)]
    lines.append(toy_line("fedit", 100, 0.9, 0.1))
    assert [(row.arm, row.rate) for row in scored(lines, "V1")] == [
        ("fedit", 0.1),
        ("fedit", 0.3),
        ("other", 0.1),
    ]
    assert "| other | 0.1 | 1 | 70.0 |  |  | +20.0 |" in tables(lines, "V1")


@pytest.mark.parametrize(
    ("curve", "expected"), [([[0, 0.5], [5, 0.5]], 0.5), ([[0, 0.0], [1, 1.0], [3, 1.0]], 2.5 / 3)]
)
def test_area_is_a_mean_over_rounds(curve, expected):
    assert area(curve) == pytest.approx(expected)


# tables


def toy_line(arm, seed, accuracy, rate=0.1):
    return {
        "setting": "V1",
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "accuracy": accuracy,
        "domains": {} if accuracy is None else dict.fromkeys(DOMAINS, accuracy),
        "auc": accuracy,
        "aggregation_error": 0.02,
        "bytes_up": 2_000_000,
        "bytes_down": 1_000_000,
        "server_s": 0.25,
        "commit": "abc",
    }


FEDIT = (0.55, 0.60, 0.57, 0.62, 0.58)
OTHER = (0.56, 0.63, 0.57, 0.64, 0.61)


def toy():
    lines = [toy_line("fedit", seed, value) for seed, value in enumerate(FEDIT)]
    # other order, and a seed that FedIT lacks
    lines += [toy_line("other", seed, OTHER[seed]) for seed in (3, 1, 4, 0, 2)]
    return [*lines, toy_line("other", 7, 0.99), toy_line("other", 100, 0.98)]


def test_intervals_are_those_of_a_paired_t_test():
    baseline, other = scored(toy(), "V1")
    found = estimate(differences(other, baseline))
    reference = stats.ttest_rel(OTHER, FEDIT)
    interval = reference.confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert found.error == pytest.approx(found.mean / reference.statistic)
    # by hand: differences 1 3 0 2 3 points
    assert (found.mean, found.deviation) == pytest.approx((0.018, 0.013038), abs=1e-6)


def test_the_table_says_the_same():
    text = tables(toy()[:-2], "V1")
    assert "| fedit | 0.1 | 5 | 58.4 | 2.7 | 1.2 |  |  |" in text
    assert "| other | 0.1 | 5 | 60.2 | 3.6 | 1.6 | +1.8 ± 0.6 | +0.2 to +3.4 |" in text
    assert "2.00 MB | 1.00 MB | 0.25 s |" in text


def test_one_seed_has_no_spread():
    assert estimate([0.5]).interval is None
    assert "| fedit | 0.1 | 1 | 55.0 |  |  |" in tables(toy()[:1], "V1")


def test_failed_runs_have_no_mean():
    lines = [*toy(), toy_line("broken", 0, 0.7), toy_line("broken", 1, None)]
    text = tables(lines, "V1")
    assert "| broken | 0.1 | 2 | 1 of 2 failed |" in text
    assert "70.0" not in text


def test_a_pair_needs_both_runs():
    baseline = Row(
        "fedit", 0.1, {0: {"accuracy": 0.5}, 1: {"accuracy": None}, 2: {"accuracy": 0.6}}
    )
    other = Row("other", 0.1, {0: {"accuracy": 0.75}, 1: {"accuracy": 0.9}, 3: {"accuracy": 0.1}})
    assert differences(other, baseline) == [0.25]


def test_the_command_writes_a_page_and_a_small_picture(tmp_path, capsys):
    path, out = tmp_path / "results.jsonl", tmp_path / "vision.md"
    path.write_text("".join(json.dumps(line) + "\n" for line in toy()))
    main([str(path), "--out", str(out)])
    assert "## V1" in out.read_text()
    assert capsys.readouterr().out.strip() == out.read_text().strip()
    picture = out.with_suffix(".png")
    assert 5_000 < picture.stat().st_size < 200_000
    assert Image.open(picture).size[0] > 400
