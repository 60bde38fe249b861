"""The job file: defaults, problems, overrides, and the way back to TOML."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import METHODS
from fedlora.config.job import Hostile, Job
from fedlora.config.load import dump_job, load_job, parse_job
from fedlora.config.privacy import PrivacySection
from fedlora.config.template import render_template
from fedlora.errors import ConfigError
from fedlora.strategies import STRATEGIES

KNOWN = {"adapter.method": list(METHODS), "federation.strategy": list(STRATEGIES)}


def problems(tree, overrides=(), known=None):
    with pytest.raises(ConfigError) as caught:
        parse_job(tree, overrides, known)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_the_template_is_the_default_job(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(render_template(), "utf-8")
    assert load_job(path, known=KNOWN) == Job()


def _kind(section):
    return PrivacySection if section.default is None else section.annotation


def test_the_template_names_and_explains_every_field():
    lines = render_template().splitlines()
    for name, section in Job.model_fields.items():
        # a table that may be missing is commented out
        start = lines.index(f"# [{name}]" if section.default is None else f"[{name}]")
        for key, field in _kind(section).model_fields.items():
            place = next(
                i
                for i in range(start, len(lines))
                if lines[i].removeprefix("# ").split(" = ")[0].split(": ")[0].removesuffix(" =")
                == key
            )
            assert field.description, f"{name}.{key} has no documentation"
            assert lines[place - 1].startswith("# ")
    for key in Hostile.model_fields:
        assert any(line.startswith(f"# {key} =") for line in lines)


def test_the_template_stays_valid_with_every_example_switched_on():
    """Also the commented table of hostile clients is TOML that the job takes."""
    head, table = render_template().split("# [[scenario.hostile]]")
    switched = "\n".join(
        line.removeprefix("# ") if " = " in line else "" for line in table.splitlines()
    )
    tree = tomllib.loads(head + "[[scenario.hostile]]\n" + switched)
    assert parse_job(tree).scenario.hostile == [Hostile(kind="sign-flip")]


def test_problems_are_reported_together():
    found = problems(
        {
            "adapter": {"rank": 0, "metod": "lora", "method": "lorra"},
            "trainings": {},
            "federation": {"rounds": "5", "strategy": "fedti"},
            "run": {"engine": "locl"},
        },
        overrides=["nonsense"],
        known=KNOWN,
    )
    text = "\n".join(found)
    assert len(found) == 8, text
    for part in (
        "override 'nonsense' is not of the form",
        'adapter.method = "lorra" is not known (did you mean "lora"?)',
        'federation.strategy = "fedti" is not known (did you mean "fedit"?)',
        'adapter.metod is not a known key (did you mean "method"?)',
        'trainings is not a known key (did you mean "training"?)',
        "adapter.rank = 0: input should be greater than or equal to 1",
        "federation.rounds = '5': input should be a valid integer",
        "run.engine = 'locl' is not known (did you mean \"local\"?); known: local, ray",
    ):
        assert part in text, part


def test_combinations_that_do_not_fit_are_reported_together():
    first, second, third = problems(
        {
            "partition": {"clients": 3},
            "federation": {"clients_per_round": 4, "quorum": 5},
            "scenario": {"hostile": [{"kind": "label-flip"}]},
        }
    )
    assert "federation.clients_per_round = 4 is more than partition.clients = 3" in first
    assert "federation.quorum = 5 is more than the 4 clients of a round" in second
    assert "label-flip" in third


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"privacy": {}}, "neither epsilon nor noise_multiplier"),
        ({"privacy": {"epsilon": 0.0}}, "privacy.epsilon = 0.0"),
        ({"privacy": {"epsilon": 1.0, "delta": 1.0}}, "privacy.delta = 1.0"),
        ({"privacy": {"epsilon": 1.0, "noise_seed": 3}}, "privacy.noise_seed: the noise"),
        ({"federation": {"wrappers": [5]}}, "federation.wrappers.0 = 5"),
        ({"model": 5}, "model = 5"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate = nan"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate = inf"),
        ({"training": {"learning_rate": 0.0}}, "greater than 0"),
        ({"data": {"validation_fraction": 1.0}}, "less than 1"),
        ({"data": {"packed": 1}}, "data.packed = 1"),
        ({"adapter": {"rank": True}}, "adapter.rank = True"),
        ({"adapter": {"rank": 4.0}}, "adapter.rank = 4.0"),
        ({"run": {"seed": 2**53}}, "run.seed"),
        ({"scenario": {"ranks": [0]}}, "scenario.ranks.0 = 0"),
        ({"scenario": {"hostile": [{"kind": "nane"}]}}, 'did you mean "nan"'),
        ({"scenario": {"hostile": [{"kind": "nan", "power": 2}]}}, "scenario.hostile.0.power"),
        ({"scenario": {"hostile": [{}]}}, "scenario.hostile.0.kind"),
        ({"evaluation": {"baselines": ["locale"]}}, 'did you mean "local"'),
    ],
)
def test_every_bad_value_is_named_with_its_key(tree, message):
    assert message in "\n".join(problems(tree))


def test_plug_ins_are_let_through_and_unknown_names_are_not():
    tree = {"federation": {"strategy": "mine.py:Mine"}}
    assert parse_job(tree, known=KNOWN).federation.strategy == "mine.py:Mine"
    (found,) = problems({"federation": {"strategy": "xyz"}}, known=KNOWN)
    assert found.endswith("known: " + ", ".join(STRATEGIES))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.name=first", "first"),
        ('run.name="first"', "first"),
        ("run.name=a=b", "a=b"),
        ("run.seed=7", 7),
        ("training.learning_rate=1e-3", 1e-3),
        ("training.learning_rate=1", 1.0),
        ("data.packed=false", False),
        ('adapter.targets=["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("adapter.targets=all-linear", "all-linear"),
        ("adapter.options.r2=2", {"r2": 2}),
        ("scenario.ranks=[2, 4]", [2, 4]),
    ],
)
def test_overrides_change_one_value(override, value):
    section, key = override.split("=")[0].split(".")[:2]
    changed = parse_job({}, [override])
    assert getattr(getattr(changed, section), key) == value
    default = Job().model_dump()
    default[section][key] = value
    assert changed.model_dump() == default


def test_later_overrides_win_and_all_win_over_the_file(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("[run]\nseed = 1\nname = 'file'\n")
    job = load_job(path, ["run.seed=2", "run.seed=3"])
    assert (job.run.seed, job.run.name) == (3, "file")


@pytest.mark.parametrize(
    "override", ["seed", "=1", ".=1", "run.=1", "run..seed=1", "run.seed.deep=1", "run.sed=1"]
)
def test_overrides_that_mean_nothing_are_refused(override):
    assert problems({"run": {"seed": 1}}, [override])


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    missing = tmp_path / "missing.toml"
    with pytest.raises(ConfigError, match="does not exist; write one with: fedlora init"):
        load_job(missing)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_job(tmp_path)
    (tmp_path / "broken.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_job(tmp_path / "broken.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_job(tmp_path / "binary.toml")


NUMBERS = st.integers(1, 50)
FLOATS = st.floats(1e-6, 0.9)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3)
JOBS = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries({}, optional={"name": st.text(), "revision": st.text()}),
        "partition": st.fixed_dictionaries({"clients": NUMBERS}, optional={"alpha": FLOATS}),
        "adapter": st.fixed_dictionaries(
            {},
            optional={
                "rank": NUMBERS,
                "alpha": FLOATS,
                "targets": st.just("all-linear") | st.lists(st.text(max_size=4), min_size=1),
                "options": st.dictionaries(st.text(max_size=4), NUMBERS | FLOATS | st.booleans()),
            },
        ),
        "training": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": FLOATS,
                "max_grad_norm": st.just(0) | FLOATS,
                "schedule": st.sampled_from(["constant", "cosine"]),
                "weight_decay": st.just(0) | FLOATS,
            },
        ),
        "scenario": st.fixed_dictionaries(
            {},
            optional={
                "ranks": st.lists(NUMBERS, max_size=3),
                "hostile": st.lists(
                    st.fixed_dictionaries(
                        {"kind": st.sampled_from(["nan", "scale"])},
                        optional={"clients": st.lists(TEXTS), "strength": FLOATS},
                    ),
                    max_size=2,
                ),
            },
        ),
        "run": st.fixed_dictionaries({}, optional={"seed": st.integers(0, 2**53 - 1)}),
    },
)


@settings(max_examples=60)
@given(JOBS)
def test_a_job_survives_being_written_and_read(tree):
    job = parse_job(tree)
    again = parse_job(tomllib.loads(dump_job(job)))
    assert again == job
    assert again.digest() == job.digest()


def test_every_value_changes_the_digest():
    job = Job()
    for override in ("run.seed=1", "training.batch_size=9", "adapter.options={a=1}"):
        assert parse_job({}, [override]).digest() != job.digest()


def test_no_value_can_only_be_said_by_leaving_it_out():
    """TOML has no null: a field that may be None but is something else by default could
    not be switched off in a file, and would come back from a written job as the default.
    """
    silent = [
        f"{name}.{key}"
        for name, section in Job.model_fields.items()
        for key, field in _kind(section).model_fields.items()
        if type(None) in getattr(field.annotation, "__args__", ()) and field.default is not None
    ]
    assert silent == []


def test_no_number_of_clients_is_only_for_data_that_decide_it():
    overrides = ["partition.clients=0", "partition.kind=natural"]
    assert parse_job({}, overrides).partition.clients == 0
    (found,) = problems({"partition": {"clients": 0, "kind": "iid"}})
    assert found == 'partition.clients = 0; partition.kind = "iid" needs a number'
