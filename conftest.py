"""Read before any test imports Triton, which transformers does."""

import os

import torch

if not torch.cuda.is_available():
    # kernels run in Triton's interpreter, if a test asks for them (FEDLORA_OPS = interpret)
    os.environ.setdefault("TRITON_INTERPRET", "1")
