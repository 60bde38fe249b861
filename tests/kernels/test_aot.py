"""Every kernel compiles for an A100 and an H100 or H200, in registers alone.

The interpreter takes what no GPU takes: a product over fewer than 16 numbers of 16 bits, tiles
that no register file holds.
"""

import json
import os
import subprocess
import sys

import pytest

# shared memory of one block, of the smaller of both: 163 KB, 227 KB on the other
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="module")
def rows():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_launch_fits_in_registers(rows):
    compiled = [row for row in rows if "case" in row]
    assert compiled
    for row in compiled:
        assert row["STACK"] == row["LOCAL"] == 0, row
        assert row["REG"] <= 255, row
        assert row["SHARED"] <= SHARED[row["target"]], row


def test_every_kernel_has_a_case(rows):
    bare = {row["module"]: row["bare"] for row in rows if row.get("bare")}
    assert not bare
