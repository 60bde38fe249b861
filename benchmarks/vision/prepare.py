"""Makes the data and the pretrained model of the vision benchmark.

scikit-learn's 1797 digits of 8 x 8 pixels (https://archive.ics.uci.edu/dataset/80, its test
part) are divided at random into 700 for pretraining, 700 for the federation and 397 for the
test. Each of six domains shows the federation's and the test's pictures through one transform
of its own, so clients of different domains differ in features and not in classes. A seed
changes the division, the model and the clients.
"""

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fedlora.data.partition import partition_rows
from fedlora.data.rows import Row, Table
from fedlora.models.loading import quiet
from fedlora.seeds import derive_seed, generator

PRETRAIN, POOL, TEST = 700, 700, 397
DOMAINS = ("binarise", "invert", "rotate-left", "rotate-right", "shift", "zoom")
CLIENTS_PER_DOMAIN = 2
ALPHA = 0.3
STEPS = 1000
BATCH = 32
RATE = 1e-3


def split(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the digits for pretraining, federation and test; no digit is in two."""
    order = torch.randperm(PRETRAIN + POOL + TEST, generator=generator(seed, "split"))
    first, second, third = order.split([PRETRAIN, POOL, TEST])
    return first, second, third


def transform(pictures: Tensor, domain: str) -> Tensor:
    """The pictures as a domain shows them.

    Args:
        pictures: (n, 8, 8), ink between 0 and 1.
        domain: one of DOMAINS. Rotations are of 30 degrees, "shift" is 0.28 of half a side
            right and down, "zoom" enlarges the middle three quarters, "invert" keeps 0.6 and
            "binarise" 0.5 of the contrast.
    """
    if domain == "invert":
        return 0.6 * (1 - pictures)
    if domain == "binarise":
        return 0.5 * (pictures > 0.5).float()
    # 30 degrees: cosine sqrt(3) / 2, sine 1 / 2; maps places in the result to the original
    cosine, sine = 0.75**0.5, 0.5
    affine = {
        "rotate-left": [[cosine, -sine, 0.0], [sine, cosine, 0.0]],
        "rotate-right": [[cosine, sine, 0.0], [-sine, cosine, 0.0]],
        "shift": [[1.0, 0.0, -0.28], [0.0, 1.0, -0.28]],
        "zoom": [[0.75, 0.0, 0.0], [0.0, 0.75, 0.0]],
    }[domain]
    theta = torch.tensor(affine).expand(len(pictures), 2, 3)
    grid = F.affine_grid(theta, [len(pictures), 1, 8, 8], align_corners=False)
    return F.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0]


def prepare(folder: Path, seed: int) -> Path:
    """The folder of a seed: model/, train.parquet and test.parquet; made if missing.

    Rows have a picture (PNG bytes), a label, a domain and, for training, the client that has
    it when each domain is divided between two clients by a Dirichlet draw per class.
    """
    place = folder / f"seed{seed}"
    if place.is_dir():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    pictures, labels = _digits()
    clean, pool, test = split(seed)
    # it appears whole, by rename, however many processes want it at once
    with tempfile.TemporaryDirectory(dir=folder) as name:
        staging = Path(name) / place.name
        staging.mkdir()
        for part, numbers, divided in (("train", pool, True), ("test", test, False)):
            rows = list(_rows(pictures[numbers], labels[numbers], seed if divided else None))
            pq.write_table(pa.Table.from_pylist(rows), staging / f"{part}.parquet")
        _pretrain(staging / "model", pictures, labels, clean, test, seed)
        try:
            staging.rename(place)
        except OSError:
            # one that another process has made meanwhile is the same
            if not place.is_dir():
                raise
    return place


def divide(labels: list[str], domain: str, seed: int) -> list[str]:
    """The client of each picture of a domain, by the platform's Dirichlet division."""
    rows = [Row({"label": label}, f"{domain} {place}") for place, label in enumerate(labels)]
    division = partition_rows(
        Table(domain, ("label",), rows),
        "dirichlet",
        clients=CLIENTS_PER_DOMAIN,
        column="label",
        alpha=ALPHA,
        min_size=BATCH,
        seed=derive_seed(seed, "domain", domain),
    )
    names = [""] * len(labels)
    for place, numbers in enumerate(division.clients.values()):
        for number in numbers:
            names[number] = f"{domain}-{place}"
    return names


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)


def _rows(pictures: Tensor, labels: Tensor, seed: int | None) -> Iterator[dict[str, Any]]:
    names = [str(label) for label in labels.tolist()]
    for domain in DOMAINS:
        clients = [""] * len(names) if seed is None else divide(names, domain, seed)
        for picture, label, client in zip(transform(pictures, domain), names, clients, strict=True):
            yield {"image": _png(picture), "label": label, "domain": domain, "client": client}


def _picture(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().byte().numpy())


def _png(picture: Tensor) -> bytes:
    file = io.BytesIO()
    _picture(picture).save(file, "PNG")
    return file.getvalue()


def _pretrain(
    folder: Path, pictures: Tensor, labels: Tensor, clean: Tensor, test: Tensor, seed: int
) -> None:
    import transformers

    processor = transformers.ViTImageProcessorPil(do_resize=False)
    whole = processor(
        images=[_picture(picture).convert("RGB") for picture in pictures], return_tensors="pt"
    )["pixel_values"]  # (1797, 3, 8, 8), between -1 and 1
    names = [str(label) for label in range(10)]
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        id2label=dict(enumerate(names)),
        label2id={name: place for place, name in enumerate(names)},
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "pretrain"))
        model = transformers.ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    draws = generator(seed, "pretrain", "order")
    model.train()
    for _ in range(STEPS):
        picks = clean[torch.randperm(len(clean), generator=draws)[:BATCH]]
        loss = F.cross_entropy(model(pixel_values=whole[picks]).logits, labels[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        hits = model(pixel_values=whole[test]).logits.argmax(-1) == labels[test]
    with quiet():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    (folder / "accuracy.txt").write_text(f"{float(hits.float().mean()):.4f} on clean digits\n")
