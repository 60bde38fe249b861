"""Which clients of a simulation are trained together: a rule on shapes, so that it is repeatable.

One pass over several clients saves what a pass costs whatever its size. On a processor that is
worth having while a client's own pass is small; a larger one is slower in company, because its
activations leave the cache. The bounds are from benchmarks/results/cohort.md; that of a GPU is a
prediction: from there on a pass fills it.
"""

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
    """How many clients are trained together.

    Attributes:
        clients: 1 trains one after the other.
        why: the reason, for the run's record.
    """

    clients: int
    why: str


def cohort_width(job: Job, loaded: Loaded) -> Width:
    """What run.cohort means for a job."""
    if job.run.cohort == "off":
        return Width(1, 'run.cohort = "off"')
    if job.run.engine != "local":
        return Width(1, f'run.engine = "{job.run.engine}" has one client in a worker')
    if why := _impossible(job) or obstacle(loaded.adapted):
        return Width(1, why)
    work = _work(job, loaded)
    most, full = MOST_WORK * job.run.threads, FULL_PASS * job.run.threads
    if job.run.device.startswith("cuda"):
        most = full = FULL_GPU_PASS
    if work > most:
        return Width(
            1, f"a client's pass of {work / 1e9:.2g} G multiplications is faster by itself"
        )
    clients = int(min(MOST_CLIENTS, max(1.0, full / work)))
    return Width(clients, f"a client's pass has {work / 1e9:.2g} G multiplications")


def _impossible(job: Job) -> str:
    if job.privacy is not None and job.privacy.unit == "record":
        return "clients that train with record-level privacy are trained one by one"
    if job.federation.secure_aggregation:
        return "clients that take part in secure aggregation are trained one by one"
    if job.training.compile:
        return "compiled layers are those of one client"
    if job.federation.mode == "async":
        return "asynchronous clients are trained when they are due"
    return ""


def _work(job: Job, loaded: Loaded) -> float:
    """Multiplications of one client's forward and backward pass over a micro-batch."""
    model: Any = loaded.base.model
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    embedding = model.get_input_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    looked_up = 0 if embedding is None or tied else embedding.weight.numel()
    examples = [e for client in loaded.data.clients.values() for e in client.train[:64]]
    tokens = fmean(_tokens(model, example) for example in examples) if examples else 1.0
    return float(2 * (matrices - looked_up) * tokens * job.training.batch_size)


def _tokens(model: Any, example: Example) -> float:
    """How many positions an example has in the model."""
    pixels = example.inputs.get("pixel_values")
    if pixels is None:
        return float(len(example.inputs["input_ids"]))
    patch = getattr(model.config, "patch_size", 1)
    return float(pixels[0].numel()) / float(patch) ** 2
