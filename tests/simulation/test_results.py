"""What a finished run leaves, of runs whose model changes its shape along the way."""

import pytest

from fedlora.adapters.files import load_adapter
from fedlora.checkpoint import RunStore
from fedlora.errors import AdapterError, ConfigError
from fedlora.models.assemble import find_adapter
from fedlora.models.loaded import load
from fedlora.simulation.results import finish
from tests.simulation.runs import Run

ADAPTER = {"rank": 2, "targets": ["q_proj", "k_proj"]}
TRAINING = {"local_steps": 3, "learning_rate": 0.1}


def finished(run):
    """The run's summary, made by what made the run."""
    state = run.go()
    store = RunStore.open(run.folder, run.job.digest())
    try:
        return finish(run.federation, store, state)
    finally:
        store.close()


@pytest.fixture
def expanded(make_job, tmp_path):
    """The adapter folder of a FLoRA run, whose layers end with unequal ranks."""
    job = make_job(
        adapter=ADAPTER,
        training=TRAINING,
        partition={"clients": 2},
        federation={"strategy": "flora", "rounds": 2},
    )
    run = Run(job, tmp_path / "first")
    finished(run)
    return tmp_path / "first" / "adapter"


@pytest.mark.parametrize("strategy", ["fedit", "flora", "hetlora", "fedex-lora"])
def test_a_run_goes_on_from_an_adapter_of_unequal_ranks(expanded, strategy, make_job, tmp_path):
    folder = expanded
    spec = load_adapter(folder).spec
    assert len({layer.rank for layer in spec.layers}) == 2
    settings = {"rank": spec.rank, "alpha": spec.alpha, "start": str(folder)}
    more = make_job(
        adapter={**ADAPTER, **settings},
        training=TRAINING,
        scenario={} if strategy == "fedit" else {"ranks": [spec.rank, 3]},
        partition={"clients": 2},
        federation={"strategy": strategy, "rounds": 2},
    )
    run = Run(more, tmp_path / strategy, load(more))
    summary = finished(run)
    assert not run.of("rejected")
    (start,) = run.of("start")
    # the base is without the adapter it starts from, at the end as at the beginning
    assert start["eval"] == summary["base"]
    assert run.of("round")[-1]["eval"] == summary["global"] != summary["base"]


def test_baselines_of_an_asynchronous_run_wait_for_nobody(make_job, tmp_path):
    job = make_job(
        federation={"mode": "async", "buffer": 2, "rounds": 2},
        evaluation={"baselines": ["local", "centralised"]},
    )
    summary = finished(Run(job, tmp_path / "run"))
    assert summary["baselines"]["local"]["steps_per_client"] == 2 * job.training.local_steps
    assert summary["baselines"]["centralised"]["final"]


def test_a_personal_run_has_no_global_adapter_to_measure_or_export(make_job, tmp_path):
    """What the server holds is A alone, with which the model computes as its base."""
    run = Run(make_job(federation={"strategy": "fedsa-lora", "rounds": 1}), tmp_path / "run")
    finished(run)
    client = run.folder / "personal" / "client-000"
    with pytest.raises(AdapterError, match=f"has no global model.*{client.parent}/NAME"):
        find_adapter(run.folder)
    assert find_adapter(client) == client


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"federation": {"strategy_options": {"rate": 1}}}, "strategy_options.rate is not known"),
        ({"federation": {"strategy": "flora"}, "adapter": {"method": "dora"}}, "works on two"),
        ({"federation": {"wrappers": [{"name": "nobody"}]}}, "wrappers names 'nobody'"),
    ],
    ids=str,
)
def test_a_strategy_that_cannot_be_is_refused_before_anything_is_loaded(
    make_job, tmp_path, sections, message
):
    absent = {"model": {"name": str(tmp_path / "absent")}}
    with pytest.raises(ConfigError, match=message):
        load(make_job(**absent, **sections))
