"""Op tests run on the torch definition and on the kernel, in memory that starts as NaN."""

import pytest
import torch

GPU = torch.cuda.is_available()


@pytest.fixture(params=["torch", "triton" if GPU else "interpret"])
def impl(request, monkeypatch):
    """Which of both an op takes."""
    monkeypatch.setenv("FEDLORA_OPS", request.param)
    return request.param


@pytest.fixture(autouse=True)
def device():
    """Tensors are made on the GPU, if there is one."""
    torch.set_default_device("cuda" if GPU else "cpu")
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is NaN, so that what a kernel leaves unwritten cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
