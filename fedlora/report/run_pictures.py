"""Parts of a run's page that hold a picture."""

from fedlora.report.headline import Metric
from fedlora.report.markup import Html, element, section
from fedlora.report.page import figure, figures
from fedlora.report.partition_figure import partition_figure, partition_of
from fedlora.report.run_figures import (
    aggregation_error_figure,
    headline_figure,
    traffic_figure,
    training_loss_figure,
)
from fedlora.report.run_folder import RunRecord, drawable
from fedlora.report.run_tables import traffic_table
from fedlora.report.theme import to_svg

_ERROR_EXPLAINED = (
    "How far the merged adapter is from the weighted mean of what the clients trained: "
    "‖mean of ΔWᵢ − ΔW‖ / ‖mean of ΔWᵢ‖ over all adapted layers. Averaging the two factors of "
    "a low-rank product one by one is not averaging the product; 0 means nothing was lost."
)


def curves(run: RunRecord, metric: Metric) -> Html:
    """Held-out score and training loss by round."""
    scored = headline_figure(run, metric)
    loss = training_loss_figure(run)
    return section(
        "Rounds",
        figures(
            [
                figure(to_svg(scored, "headline", f"held-out {metric.name} per round")),
                figure(to_svg(loss, "training-loss", "training loss per round")),
            ]
        ),
    )


def partition(run: RunRecord) -> Html:
    """Which client holds what; empty where the data have no labels."""
    labels = [str(label) for label in run.start.get("labels") or []]
    parts = partition_of(run.clients, labels)
    if not parts.labels:
        return Html("")
    picture = to_svg(partition_figure(parts), "partition", "rows of each label at each client")
    kind = run.section("partition").get("kind")
    caption = f"{len(parts.clients)} clients, {len(parts.labels)} labels, {kind} partition"
    return section("Who holds what", figure(picture, caption, broad=True))


def aggregation_error(run: RunRecord) -> Html:
    """What the error is, and its course or why there is none."""
    explained = element("p", _ERROR_EXPLAINED)
    errors = [event.get("aggregation_error") for event in run.rounds]
    measured = [error for error in map(drawable, errors) if error is not None]
    title = "Aggregation error"
    if not measured:
        method = run.start.get("method", "this method")
        why = (
            f"Not measured: the weight change of {method} depends on the frozen weights and is not "
            "affine in its factors, so the server cannot form the clients' mean to compare with."
            if all(error is None for error in errors)
            else "Not finite: the clients' changes cancel out, so there is nothing to divide by."
        )
        return section(title, explained, element("p", why, css="note"))

    caption = f"Between {min(measured):.3g} and {max(measured):.3g}"
    if len(measured) < len(errors):
        caption += f"; not a number in {len(errors) - len(measured)} rounds"
    picture = to_svg(aggregation_error_figure(run), "aggregation-error", "error per round")
    return section(title, figures([figure(picture, caption + "."), explained]))


def traffic(run: RunRecord) -> Html:
    """Bytes up and down."""
    picture = to_svg(traffic_figure(run), "traffic", "bytes up and down per round")
    return section("Traffic", figures([figure(picture), traffic_table(run)]))
