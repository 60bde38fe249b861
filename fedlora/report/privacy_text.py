"""What a run promises about the data it was trained on, in words."""

from collections.abc import Mapping
from typing import Any


def privacy_lines(summary: Mapping[str, Any] | None) -> list[str]:
    """Lines for a card or a report, the promise first, what it leaves out last.

    Args:
        summary: field "privacy" of a round's event; None for a run without.
    """
    if summary is None:
        return [
            "no differential privacy. The adapter may reveal training data; treat it as "
            "confidential as the data themselves."
        ]
    how = (
        f"noise multiplier {summary['noise_multiplier']:g}, clip norm {summary['clip']:g}, "
        f"{summary['steps']} noisy steps, noise from {summary['noise']!r}"
    )
    if "population" in summary:
        how += (
            f", {summary['clients_per_round']} of {summary['population']} clients expected in a "
            f"round ({summary['sampling']} sampling)"
            f"{', clip norm adapted every round' if summary['adaptive_clip'] else ''}"
        )
    if not summary["private"]:
        return [
            "NOT PRIVATE. The noise was drawn from a seed that the job holds, for a test; whoever "
            f"has the job can subtract it ({how}).",
        ]
    return [
        f"({summary['epsilon']:.3g}, {summary['delta']:.2g})-differential privacy for one "
        f"{summary['unit']} ({summary['adjacency']}), by the {summary['accountant'].upper()} "
        f"accountant; {how}.",
        *([f"trusted: {summary['trusted']}."] if "trusted" in summary else []),
        f"not covered: {'; '.join(summary['not_covered'])}.",
    ]
