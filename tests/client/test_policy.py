"""The site's policy: every limit refuses and permits, and a hostile server gets nothing."""

import tomllib
from dataclasses import replace

import pytest

from fedlora.client.policy import LIMITS, MIB, NAMES, Policy, load_policy, render_policy
from fedlora.config.job import Job
from fedlora.errors import ConfigError, PolicyError
from fedlora.messages import Broadcast, RoundPlan
from fedlora.wire import decode_broadcast, encode_broadcast

PLAN = RoundPlan("run", 1, 0, "site-0", ("A", "B"), rank=8, local_steps=20)


def policy(**tables):
    return Policy.model_validate(tables)


def refusals(call, *args, **kwargs):
    with pytest.raises(PolicyError) as caught:
        call(*args, **kwargs)
    assert caught.value.exit_code == 2
    return caught.value.problems


def job(key, value):
    section, field = key.split(".")
    return Job.model_validate({section: {field: value}})


def at(tree, key):
    section, field = key.split(".")
    return getattr(getattr(tree, section), field)


def set_to(key, value):
    section, field = key.split(".")
    return policy(**{section: {field: value}})


def test_the_template_is_the_default_policy(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(render_policy(), "utf-8")
    assert load_policy(path) == load_policy(None) == Policy()


def test_the_template_explains_every_field():
    lines = render_policy().splitlines()
    for name, section in Policy.model_fields.items():
        start = lines.index(f"[{name}]")
        for key, field in section.annotation.model_fields.items():
            assert field.description, f"{name}.{key}"
            place = next(
                i for i in range(start, len(lines)) if lines[i].lstrip("# ").startswith(f"{key} =")
            )
            assert lines[place - 1].startswith("# ")


def test_every_field_bounds_something():
    """A field that nothing looks at would be a promise that is not kept."""
    elsewhere = {
        "base.fingerprints",
        "work.max_trial_steps",
        "transfer.max_down_mib",
        "transfer.max_up_mib",
        "transfer.max_folds",
        "transfer.max_fold_rank",
    }
    fields = {
        f"{name}.{key}"
        for name, section in Policy.model_fields.items()
        for key in section.annotation.model_fields
        if name != "privacy"
    }
    assert fields == {*NAMES, *LIMITS, *elsewhere}


def test_the_default_policy_takes_the_default_job():
    Policy().check_job(Job())
    Policy().check_plan(PLAN)


@pytest.mark.parametrize(
    ("key", "field", "value", "good", "bad"),
    [
        ("base.models", "model.name", "org/model", ["org/*"], ["builtin:*"]),
        ("work.tasks", "model.task", "causal-lm", ["causal-lm"], ["image-classification"]),
        ("work.methods", "adapter.method", "dora", ["lora", "d?ra"], ["lora"]),
        ("work.strategies", "federation.strategy", "flora", ["flora"], []),
        ("work.sources", "data.source", "/etc/passwd", ["/etc/*"], ["builtin:*", "clients"]),
        ("work.devices", "run.device", "cuda:1", ["cuda:[01]"], ["cpu", "cuda"]),
    ],
)
def test_names_that_are_permitted_and_those_that_are_not(key, field, value, good, bad):
    assert field in NAMES[key]
    set_to(key, good).check_job(job(field, value))
    [problem] = refusals(set_to(key, bad).check_job, job(field, value))
    assert f"{field} = {value!r}" in problem
    assert f"{key} = {bad}" in problem


@pytest.mark.parametrize(("key", "field"), [(k, f) for k, fields in LIMITS.items() for f in fields])
def test_a_job_may_ask_for_the_limit_and_not_for_one_more(key, field):
    limit = max(at(Job(), other) for other in LIMITS[key])
    narrow = set_to(key, limit)
    narrow.check_job(job(field, limit))
    [problem] = refusals(narrow.check_job, job(field, limit + 1))
    assert f"{field} = {limit + 1}" in problem
    assert f"permits {key} = {limit}" in problem


def test_names_are_compared_as_they_are():
    """Also on machines whose file names have no case."""
    refusals(set_to("work.methods", ["LORA"]).check_job, Job())


def test_all_refusals_come_together():
    narrow = policy(
        work={"methods": ["dora"], "max_rank": 4, "max_rounds": 2},
        privacy={"unit": "record"},
    )
    assert len(refusals(narrow.check_job, Job())) == 4


@pytest.mark.parametrize(
    "demand", [{"unit": "record"}, {"max_epsilon": 8.0}, {"max_delta": 1e-5}, {"min_noise": 0.5}]
)
def test_a_demand_of_privacy_refuses_a_job_without_it(demand):
    [problem] = refusals(policy(privacy=demand).check_job, Job())
    assert "without differential privacy" in problem
    assert f"privacy.{next(iter(demand))}" in problem


def test_a_base_is_permitted_by_its_fingerprint():
    fixed = set_to("base.fingerprints", ["ab" * 32])
    fixed.check_base("ab" * 32)
    assert "base.fingerprints" in refusals(fixed.check_base, "cd" * 32)[0]
    Policy().check_base("cd" * 32)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("work.max_rounds", "round"),
        ("work.max_local_steps", "local_steps"),
        ("work.max_trial_steps", "trial_steps"),
        ("work.max_rank", "rank"),
    ],
)
def test_a_plan_may_ask_for_the_limit_and_not_for_one_more(key, field):
    narrow = set_to(key, 30)
    narrow.check_plan(replace(PLAN, **{field: 30}))
    [problem] = refusals(narrow.check_plan, replace(PLAN, **{field: 31}))
    assert f"plan.{field} = 31" in problem
    assert f"{key} = 30" in problem


def test_folds_are_bounded_in_number_and_rank():
    folds = {"fold.1": (3, 4), "fold.2": (2,)}
    broadcast = Broadcast(PLAN, "spec", {}, folds)
    policy(transfer={"max_folds": 2, "max_fold_rank": 4}).check_broadcast(broadcast)
    [problem] = refusals(policy(transfer={"max_folds": 1}).check_broadcast, broadcast)
    assert "number of folds = 2" in problem
    [problem] = refusals(policy(transfer={"max_fold_rank": 3}).check_broadcast, broadcast)
    assert "rank of a fold = 4" in problem
    policy(transfer={"max_folds": 0}).check_broadcast(Broadcast(PLAN, "spec", {}))


def test_bytes_are_bounded_each_way():
    narrow = policy(transfer={"max_down_mib": 2.0, "max_up_mib": 1.0})
    narrow.check_bytes(down=2 * MIB, up=MIB)
    assert "transfer.max_down_mib" in refusals(narrow.check_bytes, down=2 * MIB + 1)[0]
    assert "transfer.max_up_mib" in refusals(narrow.check_bytes, up=MIB + 1)[0]


@pytest.mark.parametrize(
    ("plan", "folds"),
    [
        ({"local_steps": 1_000_001}, {}),
        ({"local_steps": 2**62}, {}),
        ({"trial_steps": 2**62}, {}),
        ({"rank": 10**9}, {}),
        ({"round": 10**18}, {}),
        ({}, {"fold.1": (10**12, 0)}),
    ],
)
def test_what_a_hostile_server_asks_is_refused_by_default(plan, folds):
    """Each passes the decoder, which knows no limits of a site."""
    broadcast = Broadcast(replace(PLAN, **plan), "0" * 64, {}, folds)
    read = decode_broadcast(encode_broadcast(broadcast))
    Policy().check_broadcast(Broadcast(PLAN, "0" * 64, {}))
    assert len(refusals(Policy().check_broadcast, read)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[work]\nmax_rnak = 3", 'work.max_rnak is not a known key (did you mean "max_rank"?)'),
        ("[wrok]\nmax_rank = 3", 'wrok is not a known key (did you mean "work"?)'),
        ("[work]\nmax_rank = 0", "work.max_rank = 0"),
        ("[work]\nmax_rank = '3'", "work.max_rank = '3'"),
        ("[work]\nmethods = 'lora'", "work.methods = 'lora'"),
        ("[work]\nmethods = ['']", "work.methods.0"),
        ("[work]\ntasks = ['causal-ml']", 'did you mean "causal-lm"'),
        ("[transfer]\nmax_up_mib = nan", "transfer.max_up_mib = nan"),
        ("[transfer]\nmax_folds = 1025", "transfer.max_folds = 1025"),
        ("[privacy]\nunit = 'recrod'", 'did you mean "record"'),
        ("[privacy]\nmax_delta = 1.0", "privacy.max_delta = 1.0"),
        ("[work", "is not valid TOML"),
        ('[base]\nmodels = ["a\\u0000"]', "NUL"),
    ],
)
def test_a_wrong_policy_is_refused_and_never_ignored(tmp_path, text, message):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_policy(path)
    assert message in str(caught.value)


def test_a_policy_that_is_not_there_is_no_default_policy(tmp_path):
    with pytest.raises(ConfigError, match=r"policy file .* fedlora init --policy"):
        load_policy(tmp_path / "policy.toml")


def test_the_template_with_every_limit_switched_on_is_valid():
    text = render_policy()
    for key, value in (("unit", '"client"'), ("max_epsilon", 3.0), ("max_delta", 1e-6)):
        text = text.replace(f"# {key} =", f"{key} = {value}")
    switched = Policy.model_validate(tomllib.loads(text))
    assert switched.privacy.unit == "client"
    assert switched.privacy.max_delta == 1e-6
