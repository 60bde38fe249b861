"""Run and comparison folders with made-up figures, and a reader for pages."""

import json
from html.parser import HTMLParser

import pytest

JOB = """
[model]
name = "builtin:tiny-llama"
task = "{task}"
[data]
source = "builtin:stdlib"
[partition]
kind = "dirichlet"
[adapter]
method = "lora"
rank = 8
[federation]
strategy = "fedit"
rounds = {planned}
[run]
name = "a run"
seed = 3
"""


class Page(HTMLParser):
    """Tags with attributes, the visible text, and tables as lists of rows of cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.pieces, self.tables, self.open = [], [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "path", "use", "rect", "image"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in ("path", "use", "rect", "image"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.pieces.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, first):
        """The table whose first heading is `first`, as mappings by heading."""
        head, *rows = next(t for t in self.tables if t and t[0][0] == first)
        return [dict(zip(head, row, strict=True)) for row in rows]

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def scores(value, task):
    if task == "causal-lm":
        return {"loss": value, "accuracy": 0.5, "perplexity": 4.0, "bits_per_byte": value}
    return {"loss": 1.0 - value, "accuracy": value}


def round_event(number, clients, task, **changes):
    event = {
        "event": "round",
        "round": number,
        "train_loss": 2.0 / number,
        "eval": scores(0.5 + 0.01 * number, task),
        "clients": list(clients),
        "missing": [],
        "rejected": 0,
        "bytes_up": 1000 * number,
        "bytes_down": 3000,
        "aggregation_error": 0.04 / number,
        "epsilon": None,
        "seconds": {"clients": 1.5, "aggregation_error": 0.5},
        "adapter_sha256": "00",
    }
    return {**event, **changes}


def start_event(compositions, task, planned):
    return {
        "event": "start",
        "round": 0,
        "name": "a run",
        "strategy": "fedit",
        "method": "lora",
        "rounds": planned,
        "num_trained": 78080,
        "num_test": 68,
        "eval": scores(0.5, task),
        "labels": [],
        "clients": {
            name: {
                "train": 90,
                "validation": 10,
                "composition": composition,
                "rank": 8,
                "hostile": [],
            }
            for name, composition in compositions.items()
        },
        "unusable": {"counts": {}, "first": {}},
        "machine": {"processor": "a processor", "threads": 1},
    }


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder; `edit` may change the list of events."""

    def make(
        *,
        task="causal-lm",
        rounds=3,
        planned=3,
        compositions=None,
        edit=None,
        summary=None,
        name="run",
    ):
        compositions = compositions or {"ada": {"x": 5, "y": 1}, "bob": {"x": 2, "y": 9}}
        events = [start_event(compositions, task, planned)]
        events += [round_event(n, compositions, task) for n in range(1, rounds + 1)]
        if edit:
            edit(events)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "job.toml").write_text(JOB.format(task=task, planned=planned))
        lines = "".join(json.dumps(event) + "\n" for event in events)
        (folder / "metrics.jsonl").write_text(lines)
        if summary is not None:
            (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


@pytest.fixture
def read_page():
    """Parses a page from its path; the document must be well nested."""

    def read(path):
        return Page(path.read_text("utf-8"))

    return read


@pytest.fixture
def summary():
    """A full summary of a causal-lm run with clients ada and bob."""

    def of(value):
        return scores(value, "causal-lm")

    return {
        "task": "causal-lm",
        "base": of(2.0),
        "global": of(1.5),
        "clients": {
            "ada": {"base": of(2.1), "global": of(1.6)},
            "bob": {"base": of(1.9), "global": of(1.95)},
        },
        "baselines": {
            "local": {
                "mean": of(1.75),
                "clients": {"ada": of(1.7), "bob": of(1.8)},
                "steps_per_client": 60,
            },
            "centralised": {
                "rounds": [{"round": n, "steps": 40 * n, "eval": of(1.4)} for n in (1, 2, 3)],
                "final": of(1.4),
            },
        },
    }
