"""Which clients of a simulation share passes of the model: a rule on shapes, so repeatable.

One pass over several clients saves what a pass costs whatever its size. On a processor that is
worth having while a client's own pass is small; a larger one is slower in company, because its
activations leave the cache. The bounds are from benchmarks/results/cohort.md; that of a GPU is a
prediction: from there on a pass fills it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedlora.adapters.stacked import obstacle
from fedlora.config.job import Job
from fedlora.data.example import Example
from fedlora.models.loaded import Loaded

# multiplications of one client's pass, per thread, up to which company is faster
MOST_WORK = 0.6e9
# and of a whole pass
FULL_PASS = 8e9
# the same on a GPU: 4,000 tokens of a model of 1B, 600 of one of 8B
FULL_GPU_PASS = 1e13
# most clients, whose adapters are all in memory
MOST_CLIENTS = 64


@dataclass(frozen=True)
class Width:
    """How many clients share a pass.

    Attributes:
        clients: 1 takes one after the other.
        why: the reason, for the run's record.
    """

    clients: int
    why: str


def cohort_width(job: Job, loaded: Loaded) -> Width:
    """What run.cohort means for the training of a job."""
    if why := _off(job) or _impossible(job) or obstacle(loaded.adapted):
        return Width(1, why)
    examples = [e for client in loaded.data.clients.values() for e in client.train[:64]]
    # a frozen matrix takes one product forward and one backward
    return _width(job, 2 * _forward(loaded, examples, job.training.batch_size))


def evaluation_width(job: Job, loaded: Loaded) -> Width:
    """What run.cohort means for clients' adapters that are scored, whatever trained them."""
    if why := _off(job) or obstacle(loaded.adapted):
        return Width(1, why)
    if job.evaluation.exact_match:
        return Width(1, "evaluation.exact_match generates with one adapter at a time")
    own = [e for client in loaded.data.clients.values() for e in client.validation[:64]]
    examples = own or loaded.data.test[:64]
    return _width(job, _forward(loaded, examples, job.evaluation.batch_size))


def _width(job: Job, work: float) -> Width:
    """The rule.

    Args:
        work: multiplications of one client's pass.
    """
    most, full = MOST_WORK * job.run.threads, FULL_PASS * job.run.threads
    if job.run.device.startswith("cuda"):
        most = full = FULL_GPU_PASS
    if work > most:
        return Width(
            1, f"a client's pass of {work / 1e9:.2g} G multiplications is faster by itself"
        )
    clients = int(min(MOST_CLIENTS, max(1.0, full / work)))
    return Width(clients, f"a client's pass has {work / 1e9:.2g} G multiplications")


def _off(job: Job) -> str:
    if job.run.cohort == "off":
        return 'run.cohort = "off"'
    if job.run.engine != "local":
        return f'run.engine = "{job.run.engine}" has one client in a worker'
    return ""


def _impossible(job: Job) -> str:
    privacy = job.privacy
    if privacy is not None and privacy.unit == "record" and privacy.per_sample == "hooks":
        return 'privacy.per_sample = "hooks" sees the examples of one client'
    if job.federation.secure_aggregation:
        return "clients that take part in secure aggregation are trained one by one"
    if job.training.compile:
        return "compiled layers are those of one client"
    if job.federation.mode == "async":
        return "asynchronous clients are trained when they are due"
    return ""


def _forward(loaded: Loaded, examples: Sequence[Example], batch_size: int) -> float:
    """Multiplications of a forward pass over so many examples like these."""
    model: Any = loaded.base.model
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    embedding = model.get_input_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    looked_up = 0 if embedding is None or tied else embedding.weight.numel()
    tokens = fmean(_tokens(model, example) for example in examples) if examples else 1.0
    return float((matrices - looked_up) * tokens * batch_size)


def _tokens(model: Any, example: Example) -> float:
    """How many positions an example has in the model."""
    pixels = example.inputs.get("pixel_values")
    if pixels is None:
        return float(len(example.inputs["input_ids"]))
    patch = getattr(model.config, "patch_size", 1)
    return float(pixels[0].numel()) / float(patch) ** 2
