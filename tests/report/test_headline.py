import math

import pytest

from fedlora.report.headline import METRICS, headline


@pytest.mark.parametrize(
    ("task", "key", "higher"),
    [
        ("causal-lm", "bits_per_byte", False),
        ("sequence-classification", "accuracy", True),
        ("image-classification", "accuracy", True),
    ],
)
def test_each_task_has_its_metric(task, key, higher):
    metric = headline(task)
    assert metric.key == key
    assert metric.higher_better is higher


def test_loss_stands_in_for_bits_per_byte_that_were_not_measured():
    assert headline("causal-lm", {"loss": 1.0, "accuracy": 0.5}).key == "loss"
    assert headline("causal-lm", {"loss": 1.0, "bits_per_byte": 2.0}).key == "bits_per_byte"
    assert headline("causal-lm", {}).key == "bits_per_byte"


def test_values_are_written_in_their_units():
    assert METRICS["bits_per_byte"].format(1.23456) == "1.2346"
    assert METRICS["accuracy"].format(0.8125) == "81.25 %"
    assert METRICS["accuracy"].format_difference(-0.01) == "1.00 points"
    assert METRICS["perplexity"].format(1e9) == "1e+09"
    assert METRICS["loss"].format(None) == "–"
    assert METRICS["loss"].format(math.nan) == "not finite"


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda m: m.key)
def test_the_best_value_gains_on_every_other(metric):
    values = [0.3, None, 0.1, math.nan, 0.7]
    (best,) = metric.best(values)
    assert all(
        metric.gain(values[best], value) >= 0 for value in values if value and not math.isnan(value)
    )


def test_nothing_is_best_alone_and_ties_are_all_best():
    metric = METRICS["accuracy"]
    assert metric.best([0.5, None]) == set()
    assert metric.best([0.5, 0.4, 0.5]) == {0, 2}
