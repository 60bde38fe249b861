import warnings

import pytest

from fedlora.report.partition_figure import OTHERS, partition_figure, partition_of
from fedlora.report.theme import to_png, to_svg


def clients(compositions):
    return {name: {"composition": composition} for name, composition in compositions.items()}


def test_counts_stand_under_their_client_and_label():
    parts = partition_of(clients({"b": {"x": 1}, "a": {"y": 2, "x": 3}}))
    assert parts.clients == ("a", "b")
    assert parts.labels == ("x", "y")
    assert parts.counts == ((3, 2), (1, 0))


def test_numbers_in_names_are_ordered_as_numbers():
    parts = partition_of(clients({f"c{i}": {f"l{i}": 1} for i in (10, 9, 100)}))
    assert parts.clients == ("c9", "c10", "c100")
    assert parts.labels == ("l9", "l10", "l100")


def test_labels_keep_the_order_of_the_data_set():
    parts = partition_of(clients({"a": {"no": 1, "yes": 1, "other": 1}}), ["yes", "no"])
    assert parts.labels == ("yes", "no", "other")


def test_rare_labels_share_a_column_and_no_row_is_lost():
    held = {"a": {f"l{i}": i + 1 for i in range(500)}, "b": {"l499": 5}}
    parts = partition_of(clients(held))
    assert len(parts.labels) == 200
    assert parts.labels[-1] == OTHERS
    assert [sum(row) for row in parts.counts] == [sum(held["a"].values()), 5]


def test_one_area_per_client_is_disjoint():
    assert partition_of(clients({"a": {"x": 1}, "b": {"y": 1}})).disjoint
    assert not partition_of(clients({"a": {"x": 1}, "b": {"x": 1}})).disjoint


@pytest.mark.parametrize(
    ("num_clients", "num_labels"), [(1, 1), (4, 3), (8, 77), (100, 10), (200, 10), (100, 77)]
)
def test_every_size_of_partition_is_drawn(num_clients, num_labels):
    held = {
        f"client {i}": {f"label {j}": 1 + i * j % 5 for j in range(num_labels)}
        for i in range(num_clients)
    }
    figure = partition_figure(partition_of(clients(held)))
    svg = to_svg(figure, "p", "partition")
    assert "client 0" in svg
    assert to_png(figure).startswith(b"\x89PNG")


def test_names_that_look_like_formulas_or_lack_a_glyph_are_drawn_as_they_are():
    held = {"$\\frac{$": {"<b>": 1, "病院": 2}, "": {"<b>": 4, "a\nb": 1}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = to_svg(partition_figure(partition_of(clients(held))), "p", '"quoted"')
    assert "$\\frac{$" in svg
    assert "&lt;b&gt;" in svg
    assert "<b>" not in svg
    assert 'aria-label="&quot;quoted&quot;"' in svg
