"""The overhead benchmark's fedlora half: it runs, and what it reports follows from the figures."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "overhead.py"


@pytest.fixture(scope="module")
def overhead():
    # by path: an installed distribution may own the name `benchmarks`
    spec = importlib.util.spec_from_file_location("overhead_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_round_counts_every_client(overhead, tmp_path):
    found = overhead.fedlora_rounds(tmp_path / "run", overhead.Size(2, 12, 3), clients=5, rounds=3)
    assert len(found["ends"]) == 3
    assert found["ends"] == sorted(found["ends"])
    assert {"clients", "reduce", "refactor", "aggregation_error"} <= found["stages"].keys()
    assert 0 < found["rss_before"] <= 2 * found["rss_peak"]
    head = (tmp_path / "run" / "HEAD").read_text()
    assert head.startswith("3 ")
    record = json.loads((tmp_path / "run" / "rounds" / "0003" / "round.json").read_text())
    assert len(record["weights"]) == 5
    assert record["events"][-1]["adapter_sha256"] == found["adapter_sha256"]


def test_same_bits_every_time(overhead, tmp_path):
    size = overhead.Size(1, 8, 2)
    runs = [overhead.fedlora_rounds(tmp_path / str(i), size, 3, 2) for i in range(2)]
    assert runs[0]["adapter_sha256"] == runs[1]["adapter_sha256"]


def test_start_up_does_not_count(overhead):
    assert overhead.updates_per_s([100.0, 101.0, 102.0], clients=50) == 50.0


@pytest.mark.slow
def test_command_writes_both_files(overhead, tmp_path, monkeypatch, capsys):
    flags = ["--no-flower", "--clients", "3", "--rounds", "3", "--repeat", "1"]
    flags += ["--memory", "2", "4", "--memory-rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["overhead.py", *flags])
    monkeypatch.setattr(overhead, "LARGE", overhead.Size(1, 16, 4))
    overhead.main()
    assert "client-updates/s" in capsys.readouterr().out
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert set(found["updates_per_s"]) == {"fedlora"}
    assert [row["clients"] for row in found["memory"]] == [2, 4, 2, 4]
    assert (tmp_path / "overhead.md").read_text() == overhead.report(found)


@pytest.mark.parametrize(("rate", "met"), [(399.0, False), (400.0, True)])
def test_the_bar_is_a_bar(overhead, rate, met):
    found = {"updates_per_s": {"fedlora": {"median": rate}}, "memory": []}
    assert [row[2] for row in overhead.bars(found)] == [met]


def test_a_server_that_keeps_updates_fails_the_memory_bar(overhead):
    def row(clients, peak):
        return {
            "size": {"layers": 4, "width": 512, "rank": 16},
            "clients": clients,
            "updates_bytes": clients * 2**18,
            "rss_before": 0,
            "rss_peak": peak,
        }

    for peak, met in ((10 * 2**20 + 900 * 2**18, False), (14 * 2**20, True)):
        found = {
            "updates_per_s": {"fedlora": {"median": 1000.0}},
            "memory": [row(100, 10 * 2**20), row(1000, peak)],
        }
        assert overhead.bars(found)[-1][2] is met
