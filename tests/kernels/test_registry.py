"""The choice between plain torch and kernels, where these cannot be used."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fedlora.errors import ConfigError
from fedlora.ops import registry

ON_GPU = SimpleNamespace(is_cuda=True)


@pytest.fixture(autouse=True)
def fresh():
    registry._problem.cache_clear()
    yield
    registry._problem.cache_clear()


@pytest.fixture(params=["absent", "too old"])
def unusable(request, monkeypatch):
    if request.param == "absent":
        monkeypatch.setitem(sys.modules, "triton", None)
        return "not installed"
    old = ModuleType("triton")
    old.__version__ = "3.1.0+git1"
    monkeypatch.setitem(sys.modules, "triton", old)
    return "Triton 3.1.0+git1 is too old; install 3.6"


def test_torch_takes_the_place_of_kernels_and_that_is_said_once(unusable, monkeypatch, caplog):
    monkeypatch.setenv("FEDLORA_OPS", "auto")
    with caplog.at_level(logging.WARNING):
        assert [registry.uses_triton(ON_GPU) for _ in range(3)] == [False] * 3
    assert len(caplog.records) == 1
    assert unusable in caplog.text


def test_kernels_that_are_asked_for_and_cannot_run_are_an_error(unusable, monkeypatch):
    monkeypatch.setenv("FEDLORA_OPS", "triton")
    with pytest.raises(ConfigError, match="FEDLORA_OPS = triton: Triton"):
        registry.uses_triton(ON_GPU)


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("FEDLORA_OPS", "cuda")
    with pytest.raises(ConfigError, match="auto, torch, triton, interpret"):
        registry.uses_triton(torch.zeros(1))


def test_without_a_gpu_nothing_is_said(unusable, monkeypatch, caplog):
    monkeypatch.delenv("FEDLORA_OPS", raising=False)
    assert not registry.uses_triton(torch.zeros(1))
    assert not caplog.records
