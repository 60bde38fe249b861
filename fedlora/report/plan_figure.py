"""A privacy plan as a picture: noise against batch size, and the way to the budget."""

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from fedlora.privacy.plan import Plan
from fedlora.report.theme import CATEGORIES, INK, MUTED, logarithmic, themed, whole_numbers


@themed
def plan_figure(plan: Plan) -> Figure:
    """Left: what larger batches would gain; right: epsilon by round, solid RDP, dashed PRV."""
    schedule = plan.schedule
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    units = "examples" if schedule.unit == "record" else "clients"
    for row, colour in zip(plan.rows, CATEGORIES * len(plan.rows), strict=False):
        label = f"epsilon {row.budget:g}"
        left.plot(plan.batches, plan.trade_off[row.budget], "o-", color=colour, label=label)
        left.plot([schedule.batch], [row.per_coordinate], "o", color=colour, markersize=9)
        rounds, rdp, prv = zip(*plan.spent[row.budget], strict=True)
        right.plot(rounds, rdp, "o-", color=colour)
        right.plot(rounds, prv, "--", color=colour)
        right.axhline(row.budget, color=colour, linewidth=0.8, alpha=0.5)
    left.set_xscale("log")
    left.xaxis.set_major_locator(FixedLocator(plan.batches))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.xaxis.set_minor_locator(NullLocator())
    logarithmic(left)
    # the lines often lie within one power of ten
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    left.set_xlabel(f"expected {units} in a step (large dot: planned)")
    left.set_ylabel("noise per coordinate / clip norm")
    left.set_title("Noise that the budget needs")
    left.legend(labelcolor=INK, loc="lower left")
    whole_numbers(right.xaxis)
    right.set_ylim(0, 1.25 * max(row.budget for row in plan.rows))
    right.set_xlabel("rounds trained")
    right.set_ylabel(f"epsilon at delta {schedule.delta:g}")
    right.set_title("What is spent on the way")
    right.plot([], [], "-", color=MUTED, label="RDP, which gates")
    right.plot([], [], "--", color=MUTED, label="PRV, tighter")
    right.legend(labelcolor=INK, loc="upper left")
    return figure
