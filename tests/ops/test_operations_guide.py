"""`docs/operations.md` says of the figures what the code makes of them."""

import re
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry

from fedlora.client.worker_metrics import WorkerMetrics
from fedlora.health import Health, Part
from fedlora.protos.worker_pb2 import StatusReply
from fedlora.telemetry.processes import ProcessMetrics
from fedlora.telemetry.run import RunMetrics
from tests.ops.events import EVENTS

GUIDE = (Path(__file__).parents[2] / "docs/operations.md").read_text()
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}


def families():
    """Every figure there is, each with one sample at least."""
    registry = CollectorRegistry()
    runs = RunMetrics(registry)
    for event in EVENTS:
        runs.take(event, "demo")
    registry.register(ProcessMetrics(lambda: Health((Part("worker", True, 1),), True)))
    registry.register(WorkerMetrics(lambda: StatusReply(stage="training")))
    return list(registry.collect())


def rows():
    """name -> row of the table, as the code has it."""
    made = {}
    for family in families():
        name = family.name + "_total" * (family.type == "counter")
        labels = {
            label
            for sample in family.samples
            if not sample.name.endswith("_created")
            for label in sample.labels
        } - {"le"}
        shown = ", ".join(f"`{label}`" for label in sorted(labels))
        made[name] = f"| `{name}` | {family.type} | {shown or '-'} | {family.documentation} |"
    return made


def test_the_table_is_what_the_code_makes():
    table = re.search(r"<!-- metrics -->\n(.*?)<!-- end -->", GUIDE, re.DOTALL)
    assert table is not None
    assert table.group(1).splitlines()[2:] == list(rows().values())


def test_names_follow_the_conventions():
    """https://prometheus.io/docs/practices/naming/"""
    for name, row in rows().items():
        assert re.fullmatch(r"fedlora_[a-z]+(_[a-z]+)*", name)
        assert name.endswith("_total") == ("| counter |" in row)
        for unit in ("bytes", "seconds"):
            if unit in name:
                assert name.removesuffix("_total").endswith(unit)


def test_every_name_in_the_guide_exists():
    kinds = {family.name: family.type for family in families()}
    known = set(rows()) | {n + s for n, k in kinds.items() for s in SUFFIXES.get(k, ())}
    named = set(re.findall(r"\bfedlora_\w+", GUIDE))
    assert set(rows()) <= named <= known


def test_the_rules_and_the_scrape_configuration_are_whole():
    scrape, alerts = (
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    )
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"]
    rules = alerts["groups"][0]["rules"]
    assert len(rules) == 3
    labels = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[3] for row in rows().values())))
    for rule in rules:
        assert rule["alert"]
        assert re.search(r"\bfedlora_\w+", rule["expr"])
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert set(re.findall(r"(\w+)=", rule["expr"])) <= labels
        shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert shown <= labels | {"instance"}
