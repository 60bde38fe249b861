"""Launches every Triton kernel once, on small odd shapes, for a checker of memory to watch.

    FEDLORA_OPS=triton compute-sanitizer --tool memcheck python -m benchmarks.kernels.launches

With FEDLORA_OPS=interpret and TRITON_INTERPRET=1 they run on a processor, which checks nothing
but this program.
"""

import torch
from torch import Tensor

from fedlora.ops import dp_lora_grads, row_ops
from fedlora.ops.client_adamw import AdamWBuffers, AdamWStep, client_adamw_
from fedlora.ops.delta_codec import decode_sum, encode
from fedlora.ops.dropout_mask import Dropout
from fedlora.ops.ds_db import grouped_ds_db
from fedlora.ops.linear_ce import linear_ce
from fedlora.ops.rmsnorm_shrink import rmsnorm_shrink

# rows of three clients, one of whom has none; inputs, outputs and rank
SIZES, INP, OUT, RANK = [37, 0, 70], 50, 43, 5


class Launches:
    """Arguments for all of them.

    Args:
        device: "cuda", or "cpu" for the interpreter.
    """

    def __init__(self, device: str) -> None:
        self.draws = torch.Generator(device).manual_seed(0)
        self.device = device
        self.kind = torch.bfloat16 if device == "cuda" else torch.float32
        keys = torch.arange(len(SIZES), device=device)
        self.dropout = Dropout(0.3, keys, 3, 5)
        self.x, self.y = self.normal(sum(SIZES), INP), self.normal(sum(SIZES), OUT)
        self.s = self.normal(sum(SIZES), RANK)
        self.a, self.b = self.normal(3, RANK, INP), self.normal(3, OUT, RANK)

    def normal(self, *shape: int) -> Tensor:
        """Random numbers."""
        made = torch.randn(*shape, generator=self.draws, device=self.device)
        return made.to(self.kind)

    def shrink(self) -> None:
        row_ops.shrink(self.x, self.a, SIZES, self.dropout, row_ops.TRITON)

    def expand(self) -> None:
        row_ops.expand_(self.y, self.s, self.b, SIZES, self.dropout, row_ops.TRITON)

    def factor_grads(self) -> None:
        """With the sum of its parts, which is a kernel of `row_blocks`."""
        row_ops.factor_grads(self.s, self.x, SIZES, self.dropout, row_ops.TRITON)

    def ds_db(self) -> None:
        grouped_ds_db(self.y, self.b, self.s, SIZES, 2.0, torch.empty_like(self.s))

    def rmsnorm_shrink(self) -> None:
        rmsnorm_shrink(self.x, self.normal(INP), self.a[0], 1e-5)

    def softmax_ce(self) -> None:
        target = torch.arange(len(self.x), device=self.device) % OUT
        linear_ce(self.x.clone().requires_grad_(), self.normal(OUT, INP), None, target)

    def sample_grads(self) -> None:
        dp_lora_grads.sample_grads(self.normal(3, 17, INP), self.normal(3, 17, OUT))

    def weighted_sum(self) -> None:
        weights = torch.rand(3, generator=self.draws, device=self.device)
        dp_lora_grads.weighted_sum(self.normal(3, OUT, INP).float(), weights)

    def client_adamw(self) -> None:
        values = [self.normal(3, 1031).float() for _ in range(3)]
        values[2].abs_()
        ones = torch.ones(3, device=self.device)
        step = AdamWStep(ones, ones, ones.bool(), ones)
        client_adamw_(AdamWBuffers(*values, values[0].bfloat16()), self.normal(3, 1031), step)

    def delta_codec(self) -> None:
        delta = self.normal(1031).float()
        codes, scales, _ = encode(delta, 127, delta.clone(), torch.tensor(3, device=self.device))
        decode_sum(codes[None], scales[None], torch.ones(1, device=self.device))


# names of the modules of `fedlora.ops.kernels`
NAMES = tuple(name for name in vars(Launches) if name[0] != "_" and name != "normal")


def main() -> None:
    """Launches one after the other, and says which, so that a message has a place."""
    launches = Launches("cuda" if torch.cuda.is_available() else "cpu")
    for name in NAMES:
        print(name, flush=True)
        getattr(launches, name)()
        if launches.device == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
