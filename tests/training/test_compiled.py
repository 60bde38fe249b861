"""training.compile: the same training, by compiled layers."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from fedlora.errors import ConfigError
from fedlora.models.loaded import load
from fedlora.training import compiled
from fedlora.training.compiled import compiled_layers
from fedlora.training.trainer import LocalWork, train


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    """Layers are traced, and what was traced is run; no machine code is made."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def prepared(make_job, dropout=0.0, **training):
    settings = {"local_steps": 3, "batch_size": 2, **training}
    job = make_job(training=settings, adapter={"dropout": dropout})
    loaded = load(job)
    return loaded, next(iter(loaded.data.clients.values())).train, job


def one_round(loaded, examples, job, number):
    return train(
        loaded.adapted,
        examples,
        LocalWork(("A", "B"), 3, 0, 3, seed=0, client="a", round=number),
        job.training,
        task=job.model.task,
        pad_id=loaded.processor.pad_id,
    )


def trained(make_job, dropout=0.0, **training):
    loaded, examples, job = prepared(make_job, dropout, **training)
    return loaded, one_round(loaded, examples, job, 1)


@pytest.mark.parametrize(("checkpointing", "dropout"), [(False, 0.3), (True, 0.0)])
def test_compiled_layers_train_the_same_adapter_and_are_compiled_once(
    make_job, checkpointing, dropout
):
    _, plain = trained(make_job, dropout, gradient_checkpointing=checkpointing)
    assert not counters["stats"]
    with_layers = {"compile": True, "gradient_checkpointing": checkpointing}
    loaded, examples, job = prepared(make_job, dropout, **with_layers)
    quick = one_round(loaded, examples, job, 1)
    first = counters["stats"]["unique_graphs"]
    assert 0 < first <= 3 * loaded.base.model.config.num_hidden_layers
    assert not counters["graph_break"]
    assert quick.loss == pytest.approx(plain.loss, rel=1e-5)
    for name, value in plain.trained.items():
        assert float((quick.trained[name] - value).norm()) <= 1e-4 * float(value.norm()), name
    one_round(loaded, examples, job, 2)
    assert counters["stats"]["unique_graphs"] == first
    # and they are as they were
    assert all(m._compiled_call_impl is None for m in loaded.base.model.modules())


def test_without_a_compiler_or_layers_it_is_refused(make_job, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setenv("CXX", "no-such-compiler")
    loaded = load(make_job())
    with (
        pytest.raises(ConfigError, match="'no-such-compiler' is not found"),
        compiled_layers(loaded.adapted, on=True),
    ):
        pass
    monkeypatch.setattr(loaded.adapted.model.config, "num_hidden_layers", 77)
    with (
        pytest.raises(ConfigError, match="has no list of 77 layers"),
        compiled_layers(loaded.adapted, on=True),
    ):
        pass


@pytest.mark.slow
def test_machine_code_trains_the_same_adapter(make_job, monkeypatch):
    """With the compiler that a job has."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    _, plain = trained(make_job, dropout=0.3)
    _, quick = trained(make_job, dropout=0.3, compile=True)
    for name, value in plain.trained.items():
        assert float((quick.trained[name] - value).norm()) <= 1e-4 * float(value.norm()), name
