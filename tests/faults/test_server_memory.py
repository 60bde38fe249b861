"""A server's memory does not grow with the clients of a round: updates wait on its disk."""

import pytest

from tests.faults.crowd import peak_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("few", "many", "layers"),
    [(5, 80, 3), pytest.param(10, 200, 16, marks=pytest.mark.slow)],
)
def test_many_large_updates_need_no_more_memory_than_few(tmp_path, few, many, layers):
    """The budget is what a round with few clients takes; the same with many, within a tenth.

    Updates of 1.5 MiB each, in the long run 200 of 8 MiB: 1.6 GB.
    """
    budget = peak_bytes(tmp_path / "few", few, layers)
    peak = peak_bytes(tmp_path / "many", many, layers)
    updates = (many - few) * layers * MIB // 2
    # or the test could not fail
    assert updates > 0.2 * budget
    assert peak <= 1.1 * budget, f"{peak / MIB:.0f} MiB instead of {budget / MIB:.0f} MiB"
