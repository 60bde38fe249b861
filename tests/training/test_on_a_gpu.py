"""What training does on a GPU only, as far as it shows without one."""

import pytest
import torch

from fedlora.data.example import Batch
from fedlora.errors import ConfigError
from fedlora.models import loaded
from fedlora.models.loaded import load


@pytest.fixture
def moves(monkeypatch):
    """What is asked of tensors on their way to a device; nothing is moved."""
    found = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self: found.append("pinned") or self, raising=True
    )
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, device, non_blocking=False: found.append((str(device), non_blocking)) or self,
    )
    return found


def test_a_batch_goes_to_a_gpu_through_pinned_memory(moves):
    Batch({"input_ids": torch.zeros(2, 3)}, torch.zeros(2)).to("cuda:0")
    assert moves == ["pinned", ("cuda:0", True)] * 2


def test_a_batch_stays_as_it_is_on_a_cpu(moves):
    Batch({"input_ids": torch.zeros(2, 3)}, torch.zeros(2)).to(torch.device("cpu"))
    assert moves == [("cpu", False)] * 2


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"training": {"precision": "bf16"}}, 'training.precision = "bf16"'),
        ({"model": {"dtype": "bfloat16"}}, 'model.dtype = "bfloat16"'),
    ],
)
def test_a_gpu_without_bfloat16_is_refused_before_anything_is_loaded(
    make_job, monkeypatch, sections, named
):
    monkeypatch.setattr(loaded, "_check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(ConfigError) as caught:
        load(make_job(run={"device": "cuda:0"}, **sections))
    assert named in str(caught.value)
    assert "'cuda:0' has no bfloat16" in str(caught.value)


def test_attention_is_that_of_torch_not_written_out(make_job):
    model = load(make_job()).base.model
    assert model.config._attn_implementation == "sdpa"
