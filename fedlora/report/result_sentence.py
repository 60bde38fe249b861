"""One sentence that says how a run came out."""

from fedlora.report.headline import Metric
from fedlora.report.held_out import baseline
from fedlora.report.run_folder import RunRecord, drawable


def result_sentence(run: RunRecord, metric: Metric) -> str:
    """The federated adapter's score, beside the base model and the clients alone."""
    summary = run.scores
    base = drawable((summary.get("base") or {}).get(metric.key))
    found = drawable((summary.get("global") or {}).get(metric.key))
    who = _plural(len(run.clients), "client")
    if not run.rounds or found is None:
        state = "No round is committed yet" if not run.rounds else "No round is evaluated yet"
        known = f"; the base model scores {_score(metric, base)}" if base is not None else ""
        return f"{state}{known}."
    done = run.last_round
    when = f"{done} of {run.num_planned} rounds" if not run.finished else _plural(done, "round")
    whose = (
        "the clients' own adapters score on average"
        if summary.get("personal")
        else "the federated adapter scores"
    )
    sentence = f"After {when} with {who}, {whose} {_score(metric, found)} on held-out data"
    compared = [_compared(metric, found, base, "the base model")]
    local = baseline(summary, "local").get("mean") or {}
    compared.append(
        _compared(metric, found, drawable(local.get(metric.key)), "a client training alone")
    )
    sentence += "".join(f", {part}" for part in compared if part)
    pooled = baseline(summary, "centralised").get("final") or {}
    value = drawable(pooled.get(metric.key))
    if value is not None:
        sentence += f"; training on all data in one place gives {metric.format(value)}"
    return sentence + "."


def _compared(metric: Metric, value: float, reference: float | None, name: str) -> str:
    if reference is None:
        return ""
    gain = metric.gain(value, reference)
    if metric.format(value) == metric.format(reference):
        return f"the same as {name}"
    word = "better" if gain > 0 else "worse"
    shown = metric.format(reference)
    return f"{metric.format_difference(gain)} {word} than {name} ({shown})"


def _score(metric: Metric, value: float | None) -> str:
    return f"{metric.format(value)} {metric.name}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
