"""What is demanded of the fast paths on an H200, and what was predicted before any measurement.

Predictions are of a roofline (790 TFLOP/s in bfloat16, 4.3 TB/s) over counted operations and
bytes; a demand is some two thirds of the predicted gain. K are the LoRA linears of one decoder
layer, M many clients together, D private steps, L the loss; the codec is that of deltas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Bar:
    """One line of the result.

    Attributes:
        name: of the figure that is judged, as a table reports it.
        what: in words.
        demand: the figure must be at least that, or at most with `most`.
        predicted: range of the prediction; equal ends for a single figure, None for none.
    """

    name: str
    what: str
    demand: float
    predicted: tuple[float, float] | None
    most: bool = False

    def passed(self, figures: Sequence[float]) -> bool | None:
        """Whether the median of the figures meets the demand; None without figures."""
        if not figures:
            return None
        found = median(figures)
        return found <= self.demand if self.most else found >= self.demand


def _bar(
    name: str,
    what: str,
    demand: float,
    low: float | None = None,
    high: float | None = None,
    *,
    most: bool = False,
) -> Bar:
    predicted = None if low is None else (low, low if high is None else high)
    return Bar(name, what, demand, predicted, most)


BARS = (
    _bar("K1 1B", "PEFT's default / ours, times", 1.6, 2.0),
    _bar("K1 8B", "PEFT's default / ours, times", 1.35, 1.58),
    _bar("K2 1B", "PEFT under bfloat16 autocast / ours, times", 1.35, 1.58),
    _bar("K2 8B", "PEFT under bfloat16 autocast / ours, times", 1.2, 1.34),
    _bar("K3 1B", "plain LoRA in bfloat16 / ours, times", 1.18, 1.28),
    _bar("K3 8B", "plain LoRA in bfloat16 / ours, times", 1.10, 1.16),
    _bar("K4 1B", "torch.compile of plain LoRA / ours, both as CUDA graphs, times", 1.05, 1.19),
    _bar("K4 8B", "torch.compile of plain LoRA / ours, both as CUDA graphs, times", 1.03, 1.11),
    _bar("K5 1B", "unsloth's order of operations (restated) / ours, times", 1.05, 1.08),
    _bar("K5 8B", "unsloth's order of operations (restated) / ours, times", 1.0, 1.05),
    _bar("K6 1B", "ours / frozen linears alone, times", 1.30, 1.23, most=True),
    _bar("K6 8B", "ours / frozen linears alone, times", 1.16, 1.12, most=True),
    _bar("K7 time", "ours with dropout 0.1 / without, 1B, times", 1.06, most=True),
    _bar("K7 saved", "bytes kept for backward with dropout / without, 1B", 1.02, 1.0, most=True),
    _bar(
        "K7 peak",
        "peak of activations with dropout, ours / plain LoRA, 1B",
        0.55,
        0.46,
        0.47,
        most=True,
    ),
    _bar(
        "K8", "peak memory of a 1B step of 8,192 tokens, ours / PEFT's", 0.60, 0.40, 0.53, most=True
    ),
    _bar("M1", "16 clients of 256 tokens, 1B: one by one / together, times", 3.0, 4.6, 7.4),
    _bar("M2", "16 clients of 512 tokens, 1B: one by one / together, times", 1.8, 2.3, 3.7),
    _bar("M3", "16 clients of 256 tokens, 8 layers of 8B: times", 1.5, 1.8, 2.8),
    _bar("M4", "the slowest of M1 to M3 and of 2,048 tokens, times", 0.98),
    _bar("M5", "a process for each client that loads the model / together, 1B, times", 5.0),
    _bar("M6", "factors trained together and one by one, float32, relative", 1e-5, most=True),
    _bar("M7 equal", "best product of torch / grouped kernels, 16 equal groups, times", 0.97, 1.0),
    _bar("M7 ragged", "best product of torch / grouped kernels, groups of 1 to 16, times", 1.3),
    _bar("M7 masked", "masked product / grouped kernels, 64 clients, times", 1.5),
    _bar("D1", "private / plain step, 1B, 16 texts of 512 tokens, times", 1.10, 1.03, most=True),
    _bar("D2 hooks", "Opacus' hooks / ours, times", 1.15),
    _bar("D2 ghost", "Opacus' ghost clipping / ours, times", 1.8),
    _bar("D3", "clipped sum against float64, float32, relative", 1e-5, most=True),
    _bar("L1 memory", "loss of 8,192 x 2,048 x 128,256: extra GiB", 0.6, 0.5, most=True),
    _bar("L1 time", "ours / logits and cross_entropy, times", 1.05, most=True),
    _bar("L1 Liger", "Liger's fused loss / ours, times", 1.0),
    _bar("codec encode", "int8 with feedback, of a copy's bandwidth", 0.7),
    _bar("codec encode at random", "the same rounded at random, of a copy's bandwidth", 0.7),
    _bar("codec sum", "weighted sum of 16 coded updates, of a copy's bandwidth", 0.7),
    _bar("codec bytes", "read and written by int8 with feedback, for an entry", 13.1, most=True),
)


def judged(figures: Mapping[str, Sequence[float]]) -> list[dict[str, object]]:
    """Every bar with its prediction, its figures and whether they meet it (None: not measured)."""
    return [
        {
            "bar": bar.name,
            "what": bar.what,
            "demand": f"{'<=' if bar.most else '>='} {bar.demand:g}",
            "predicted": bar.predicted,
            "measured": list(figures.get(bar.name, ())),
            "passed": bar.passed(figures.get(bar.name, ())),
        }
        for bar in BARS
    ]
