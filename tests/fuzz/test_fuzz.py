"""Peers' bytes: a fixed short run by hypothesis, and long ones guided by atheris."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import targets

TARGETS = targets()
ROOT = Path(__file__).parents[2]


@st.composite
def damaged(draw, seeds):
    """An honest input with pieces replaced, cut out or repeated."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 16)))
        data = data[:start] + draw(st.binary(max_size=8) | st.just(data[:16])) + data[end:]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_keep_the_promise(name):
    target = TARGETS[name]

    @settings(max_examples=60)
    @given(st.binary(max_size=200) | damaged(target.seeds))
    def run(data):
        target.run(data)

    run()
    for seed in target.seeds:
        target.run(seed)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed; pip install atheris (Linux, up to Python 3.13)",
)
@pytest.mark.parametrize("name", TARGETS)
def test_a_guided_campaign_finds_nothing(name, tmp_path):
    runs = 100_000
    options = [f"-runs={runs}", "-seed=1", "-max_len=4096", "-max_total_time=300"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.campaign", name, str(tmp_path), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    executed = re.search(r"Done (\d+) runs", done.stderr)
    assert executed is not None, done.stderr[-3000:]
    assert int(executed[1]) > 1000
