"""The jobs of benchmarks/cohort.py: small clients with random words, on random weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedlora.config.job import Job

WORDS = 500
ROWS = 40  # of each client


@dataclass(frozen=True)
class Case:
    """One measurement in a process of its own.

    Attributes:
        engine: "alone", "cohort", "flower" or "flower, building".
        batch, tokens: texts of a client's step, and tokens of each.
        threads: of our own engines; each of Flower's workers has one.
        device, dtype: of our own engines' model.
    """

    engine: str
    clients: int = 16
    layers: int = 4
    hidden: int = 128
    batch: int = 4
    tokens: int = 16
    steps: int = 10
    rounds: int = 3
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"


def prepare(case: Case, folder: Path) -> None:
    """A model and rows of random words."""
    vocabulary = {"<pad>": 0, "<unk>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(WORDS)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=case.hidden,
            intermediate_size=4 * case.hidden,
            num_hidden_layers=case.layers,
            num_attention_heads=max(4, case.hidden // 64),
            num_key_value_heads=max(4, case.hidden // 256),
            max_position_embeddings=max(512, case.tokens),
            pad_token_id=0,
        )
    ).save_pretrained(folder / "model")
    draws = torch.Generator().manual_seed(0)
    count = ROWS * case.clients
    # the end of a text is a token of its own
    rows = torch.randint(WORDS, (count, case.tokens - 1), generator=draws).tolist()
    lines = ["text", *(" ".join(f"w{i}" for i in row) for row in rows)]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")


def job_for(case: Case, folder: Path) -> Job:
    """The job of a case."""
    return Job.model_validate(
        {
            "model": {"name": str(folder / "model"), "task": "causal-lm", "dtype": case.dtype},
            "data": {
                "source": str(folder / "rows.csv"),
                "max_length": case.tokens,
                "packed": False,
                "max_validation": 1,
            },
            "partition": {"kind": "iid", "clients": case.clients},
            "adapter": {"rank": 8},
            "training": {
                "local_steps": case.steps,
                "batch_size": case.batch,
                "learning_rate": 1e-3,
            },
            "federation": {"rounds": case.rounds},
            # scores are no part of training
            "evaluation": {"every": case.rounds},
            "run": {
                "cohort": "auto" if case.engine == "cohort" else "off",
                "threads": case.threads,
                "device": case.device,
            },
        }
    )
