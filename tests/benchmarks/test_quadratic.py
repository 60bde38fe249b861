"""The table of the quadratic benchmark follows from the runs it reports."""

import pytest

from tests.strategies.quadratic import benchmark


def test_the_table_gives_mean_and_standard_error():
    setting = (4, 4, 1.0, 5)
    errors = {setting: {"fedit": [0.1, 0.2, 0.6], "flora": [0.2, 0.2, 0.2]}}
    lines = benchmark.table(errors, {setting: 0.25})
    assert lines[0] == "| r*, r, h, tau | fedit | flora | cross-term of fedit |"
    # standard deviation 0.2646 over sqrt(3)
    assert lines[2] == "| 4, 4, 1, 5 | 0.300 ± 0.153 | 0.200 ± 0.000 | 0.250 |"
    assert benchmark.orders(errors)[2] == "| 4, 4, 1, 5 | 1 |"


def test_the_page_names_command_machine_and_every_setting():
    settings = ((4, 4, 0.0, 2), (8, 2, 1.0, 3))
    options = benchmark.arguments(["--seeds", "2", "--strategies", "fedit,flora"])
    page = benchmark.report(options, "the command", settings)
    assert "    the command\n" in page
    assert "torch" in page
    errors, cross_terms = benchmark.measure(["fedit", "flora"], 2, settings)
    for line in (*benchmark.table(errors, cross_terms), *benchmark.orders(errors)):
        assert line in page
    assert list(errors) == list(settings)
    assert cross_terms[settings[0]] < 1e-6 < cross_terms[settings[1]]


def test_the_defaults_are_strategies_with_one_global_model():
    names = benchmark.arguments([]).strategies
    assert {"fedit", "flexlora", "flora", "fedex-lora", "lora-fair", "fedsvd"} <= set(names)
    assert not any(benchmark.STRATEGIES[name].personal for name in names)


def test_targets_are_as_far_from_their_mean_as_they_say():
    common, goals = benchmark.targets(2.0, 3)
    own = (goals - common) / 2.0
    assert own.sum(0).abs().max() < 1e-12
    assert own.flatten(1).norm(dim=1).mean().item() == pytest.approx(32**0.5)
    assert common.norm().item() == pytest.approx(32**0.5)
