"""A small classifier with LoRA on its two linear layers, and each node's own data."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

RANK, ALPHA = 4, 8


class Classifier(nn.Module):
    """Two linear layers and a head; the head is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 4) of rows (n, 16)."""
        logits: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(x)))))
        return logits


def make_model() -> PeftModel:
    """The same base and the same starting adapter at the server and every client."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["first", "second"], modules_to_save=["head"]
    )
    return get_peft_model(Classifier(), config)


def make_data(seed: int, rows: int = 256) -> tuple[Tensor, Tensor]:
    """Rows (rows, 16), and as label the largest of four sums of columns, which all share."""
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
    return x, x.reshape(rows, 4, 4).sum(2).argmax(1)
