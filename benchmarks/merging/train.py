"""Trains what the merging benchmark merges: one LoRA per domain of the vision benchmark.

An adapter sees the training pictures of one domain and nothing else; the pretrained head stays
as it is. Adapters are kept as folders, so that `fedlora merge` can take them as well.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.vision.prepare import DOMAINS, TEST
from benchmarks.vision.settings import SCALE, Arm, Setting, make_job
from fedlora.adapter import AdapterSpec, with_rank
from fedlora.adapters.files import AdapterFolder, save_adapter
from fedlora.config.job import Job
from fedlora.data.example import Example
from fedlora.evaluate import evaluate
from fedlora.linalg import Pair
from fedlora.merging.sources import Source, read_source
from fedlora.models.loaded import Loaded, load
from fedlora.seeds import derive_seed
from fedlora.training.trainer import LocalWork, train

STEPS = 150
RATE = 5e-3
RANKS = (2, 2, 4, 4, 8, 8)


@dataclass(frozen=True)
class Case:
    """How the adapters of one table came to be.

    Attributes:
        title: what they are.
        ranks: domain -> rank of its adapter, in the order of DOMAINS.
        shared: all start from the same A, as in a federation; else each draws its own.
    """

    title: str
    ranks: Mapping[str, int]
    shared: bool = False


CASES = {
    "own": Case("rank 4, every adapter its own initial A", dict.fromkeys(DOMAINS, 4)),
    "unequal": Case(
        "ranks 2, 2, 4, 4, 8, 8, every adapter its own initial A",
        dict(zip(DOMAINS, RANKS, strict=True)),
    ),
    "shared": Case("rank 4, one initial A for all", dict.fromkeys(DOMAINS, 4), shared=True),
    # inverted pictures are so far from the others that their adapter undoes what these learn
    "five": Case(
        "as own, without the domain invert",
        {domain: 4 for domain in DOMAINS if domain != "invert"},
    ),
}


class Bench:
    """Model and data of one seed.

    Args:
        place: the seed's folder, as `benchmarks.vision.prepare` makes it.
        seed: names all random streams.
    """

    def __init__(self, place: Path, seed: int) -> None:
        # the job only says what is loaded; nothing is federated
        setting = Setting("domain", steps=STEPS, rounds=1, every=1, ranks=(max(RANKS),))
        self.job: Job = make_job(setting, Arm("fedit"), place, rate=RATE, seed=seed)
        self.loaded: Loaded = load(self.job)
        self.seed = seed
        assert {layer.scale for layer in self.loaded.initial.spec.layers} == {SCALE}

    def hold(self, spec: AdapterSpec, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts an adapter into the model."""
        self.loaded.adapted.rerank(spec)
        self.loaded.adapted.load(tensors)

    def hold_change(self, changes: Mapping[str, Pair]) -> None:
        """Puts a merged change into the model, as a LoRA of scale 1 like `fedlora merge` writes."""
        layers = tuple(
            dataclasses.replace(layer, rank=changes[layer.name][1].shape[0], scale=1.0)
            for layer in self.loaded.initial.spec.layers
        )
        rank = max(layer.rank for layer in layers)
        tensors = {}
        for name, (left, right) in changes.items():
            tensors[f"{name}.B"], tensors[f"{name}.A"] = left.float(), right.float()
        self.hold(dataclasses.replace(self.loaded.initial.spec, rank=rank, layers=layers), tensors)

    def test(self, domain: str) -> list[Example]:
        """The test pictures of a domain."""
        place = DOMAINS.index(domain)
        return self.loaded.data.test[place * TEST : (place + 1) * TEST]

    def accuracies(self, domains: Iterable[str] = DOMAINS) -> dict[str, float]:
        """Accuracy on the test pictures of every domain, of the model as it stands."""
        return {
            domain: evaluate(
                self.loaded.base.model,
                self.test(domain),
                task=self.job.model.task,
                pad_id=self.loaded.processor.pad_id,
                batch_size=TEST,
            )["accuracy"]
            for domain in domains
        }

    def adapters(self, folder: Path, case: Case) -> list[Source]:
        """The adapters of a case, by domain; those missing in `folder` are trained."""
        found = []
        for domain, rank in case.ranks.items():
            start = "shared" if case.shared else "own"
            place = folder / f"seed{self.seed}" / f"{domain}-{start}-{rank}"
            if not (place / "adapter_config.json").is_file():
                self._train(place, domain, rank, case.shared)
            found.append(read_source(place))
        return found

    def _train(self, place: Path, domain: str, rank: int, shared: bool) -> None:
        names = ("adapter",) if shared else ("adapter", domain)
        spec = dataclasses.replace(
            with_rank(self.loaded.initial.spec, rank), seed=derive_seed(self.seed, *names)
        )
        adapted, job = self.loaded.adapted, self.job
        new = {
            f"{layer.name}.{factor}": tensor
            for layer in spec.layers
            for factor, tensor in adapted.method.fresh(layer, spec.seed).items()
        }
        self.hold(spec, new)
        settings = job.training.model_copy(update={"optimizer": "adamw", "schedule": "cosine"})
        train(
            adapted,
            self.loaded.data.clients[domain].train,
            LocalWork(
                factors=("A", "B"),
                steps=STEPS,
                first_step=0,
                total_steps=STEPS,
                seed=self.seed,
                client=domain,
                round=1,
            ),
            settings,
            task=job.model.task,
            pad_id=self.loaded.processor.pad_id,
        )
        folder = AdapterFolder(
            spec=spec,
            tensors=adapted.state().tensors,
            basis={},
            base_model=job.model.name,
            task=job.model.task,
            labels=self.loaded.data.labels,
        )
        save_adapter(place, folder, f"LoRA of rank {rank} for digits through `{domain}`.\n")
