"""training.compile: the same training, by compiled layers."""

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


def trained(make_job, *, rounds=1, **training):
    job = make_job(training={"local_steps": 3, "batch_size": 2, **training})
    loaded = load(job)
    examples = next(iter(loaded.data.clients.values())).train
    for number in range(1, rounds + 1):
        work = LocalWork(("A", "B"), 3, 0, 3, seed=0, client="a", round=number)
        result = train(
            loaded.adapted,
            examples,
            work,
            job.training,
            task=job.model.task,
            pad_id=loaded.processor.pad_id,
        )
    return loaded, result


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_the_same_adapter(make_job, checkpointing):
    _, plain = trained(make_job, gradient_checkpointing=checkpointing)
    assert not counters["stats"]
    _, quick = trained(make_job, compile=True, gradient_checkpointing=checkpointing)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert quick.loss == pytest.approx(plain.loss, rel=1e-5)
    for name, value in plain.trained.items():
        assert float((quick.trained[name] - value).norm()) <= 1e-4 * float(value.norm()), name


def test_texts_of_other_lengths_and_later_rounds_compile_no_more(make_job):
    loaded, _ = trained(make_job, compile=True)
    after_one = counters["stats"]["unique_graphs"]
    assert after_one <= 3 * loaded.base.model.config.num_hidden_layers
    counters.clear()
    trained(make_job, compile=True, rounds=3)
    # of another model, whose rounds are three: as many as the first one took
    assert counters["stats"].get("unique_graphs", 0) <= after_one


def test_afterwards_the_layers_are_as_they_were(make_job):
    loaded, _ = trained(make_job, compile=True)
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


def test_dropout_is_refused(make_job):
    with pytest.raises(ValueError, match="would compile again"):
        make_job(training={"compile": True}, adapter={"dropout": 0.1})
