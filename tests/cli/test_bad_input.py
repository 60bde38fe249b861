"""Bad input ends in one clear message, exit code 2, and nothing lost."""

import errno
import json
import os
import shutil

import pytest
from transformers import PreTrainedTokenizerBase

from fedlora.checkpoint import RunStore
from fedlora.config.load import load_job
from tests.cli.command import fedlora


@pytest.fixture
def cli(monkeypatch, capsys):
    def call(*words):
        return fedlora(monkeypatch, capsys, *words)

    return call


def refused(done, *parts, code=2):
    assert done.code == code, done
    assert "Traceback" not in done.err + done.out
    assert len(done.err.splitlines()) < 24
    for part in parts:
        assert part in done.err, done.err


LABELLED = (
    'model.task="sequence-classification"',
    'data.text="text"',
    'data.label="label"',
    'partition.kind="iid"',
)


def options(*values):
    return [word for value in values for word in ("-o", value)]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.csv"
    rows = "\n".join(f"text number {i},{'ab'[i % 2]}" for i in range(12))
    path.write_text(f"text,label\n{rows}\n")
    return path


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("federation.strategy=fedti", ('"fedti" is not known', 'did you mean "fedit"')),
        ("federation.strateg=fedit", ("federation.strateg", 'did you mean "strategy"')),
        ("adapter.method=lorra", ("adapter.method", 'did you mean "lora"')),
        ('adapter.targets=["qq_proj"]', ("'qq_proj' matches no linear layer", "q_proj (4)")),
        ("adapter.rank=129", ("adapter.rank = 129", "q_proj", "larger than 128")),
        ("model.name=/no/such/folder", ("/no/such/folder", "does not exist")),
        ("model.name=builtin:tiny", ("builtin:tiny", "known: builtin:tiny-llama")),
        ("data.source=/no/such.jsonl", ("/no/such.jsonl",)),
        ("adapter.start=/no/such", ("/no/such", "adapter_config.json")),
        ("scenario.ranks=[2, 4]", ("scenario.ranks", "adapter.rank = 2")),
        ("scenario.ranks=[1, 2]", ("needs equal ranks", "ffa-lora")),
        ("privacy.epsilon=-1", ("privacy.epsilon = -1",)),
        ("privacy.unit=record", ("neither epsilon nor noise_multiplier",)),
        ("privacy.seed=1", ("privacy.seed: the noise", "os, secure")),
        ("adapter.method=a:b", ('"a:b" is not known',)),
        ("adapter.targets=[]", ("adapter.targets", "at least 1")),
        ("run.device=meta", ("run.device = 'meta'",)),
        ("data.max_length=513", ("512 positions",)),
        ("federation.strategy=mine.py:Mine", ("mine.py", "does not exist")),
        ("federation.wrappers=[{hostile = 1}]", ("names no wrapper", "'hostile': 1")),
    ],
)
def test_a_wrong_setting_is_refused(cli, job, tmp_path, override, parts):
    done = cli("simulate", job, "--out", tmp_path / "run", "-o", override)
    refused(done, *parts)
    assert not (tmp_path / "run").exists()


LONG = "x" * 300


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        *(
            (f"{key}={LONG}", (key, "File name too long"))
            for key in ("model.name", "data.source", "data.test", "adapter.start")
        ),
        ("data.source=~no-such-user/x", ("data.source", "home directory")),
        ("adapter.start=~no-such-user/x", ("adapter.start", "home directory")),
        (f"federation.strategy={LONG}.py:Mine", ("File name too long",)),
        ("data.source=''", ("data.source", "at least 1")),
        *((f"run.name={name!r}", ("run.name",)) for name in ("", "../up", "/abs", LONG)),
        (r'run.name="a\nb"', ("run.name", "control characters")),
        (r'run.name="a\u0000b"', ("run.name has a NUL",)),
        (r'data.text="a\u0000b"', ("data.text has a NUL",)),
        (r'data.labels=["a\u0000b"]', ("data.labels has a NUL",)),
        (r'federation.strategy_options={"a\u0000b"=1}', ("federation.strategy_options has a NUL",)),
        ("model.revision=a\udcffb", ("model.revision has", "no valid UTF-8")),
    ],
)
def test_a_text_that_nothing_can_hold_is_refused(cli, job, tmp_path, override, parts):
    done = cli("simulate", job, "--out", tmp_path / "run", "-o", override)
    refused(done, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["simulate", "resume", "evaluate", "export", "inspect", "compare"])
def test_a_path_that_is_too_long_is_refused(cli, tmp_path, verb):
    out = ["--out", tmp_path / "out"] if verb in ("export", "compare") else []
    refused(cli(verb, LONG, *out), "File name too long")


def test_all_problems_are_reported_together(cli, job, tmp_path):
    wrong = options("adapter.rnk=3", "federation.strategy=fedti", 'run.seed="x"', "trainng.a=1")
    done = cli("simulate", job, "--out", tmp_path / "run", *wrong)
    refused(done, "adapter.rnk", "fedti", "run.seed", "trainng")


def test_a_missing_job_file_says_how_to_write_one(cli, tmp_path):
    refused(cli("simulate", tmp_path / "job.toml"), "does not exist", "fedlora init")


def test_broken_toml_names_the_line(cli, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("[model]\nname = \n")
    refused(cli("simulate", path), "not valid TOML", "line 2")


def test_a_folder_that_is_no_model_is_refused(cli, job, tmp_path):
    (tmp_path / "model").mkdir()
    done = cli("simulate", job, "-o", f"model.name={tmp_path / 'model'}")
    refused(done, "without config.json")
    (tmp_path / "model" / "config.json").write_text("{}")
    refused(cli("simulate", job, "-o", f"model.name={tmp_path / 'model'}"), "cannot be loaded")


def test_a_missing_label_column_lists_the_columns(cli, job, tmp_path, table):
    done = cli(
        "simulate",
        job,
        *options(f"data.source={table}", *LABELLED, 'data.label="lable"'),
        "--out",
        tmp_path / "run",
    )
    refused(done, '"lable"', "label")


def test_a_row_of_the_wrong_type_is_named_by_its_line(cli, job, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 3}\n')
    refused(cli("simulate", job, *options(f"data.source={path}", 'partition.kind="iid"')), ":2")


def test_more_clients_than_examples_is_refused(cli, job, table):
    settings = options(f"data.source={table}", *LABELLED, "partition.clients=50")
    refused(cli("simulate", job, *settings), "50", "12")


def test_a_client_without_examples_is_named(cli, job, tmp_path):
    source = tmp_path / "clients"
    for name, text in (("north", "text,label\none,a\ntwo,b\n"), ("south", "text,label\n,a\n")):
        (source / name).mkdir(parents=True)
        (source / name / "rows.csv").write_text(text)
    settings = options(
        f"data.source={source}", *LABELLED, 'partition.kind="folders"', "partition.clients=2"
    )
    refused(cli("simulate", job, *settings), "south")


def test_an_output_folder_in_use_is_refused(cli, job, finished):
    refused(cli("simulate", job, "--out", finished), "not empty", "fedlora resume")


def test_an_output_below_a_file_is_refused_by_the_files_name(cli, job, finished, tmp_path):
    file = tmp_path / "file.txt"
    file.touch()
    for out in (file / "run", file / "a" / "run"):
        for words in (
            ["simulate", job, "--out", out],
            ["compare", job, "--out", out],
            ["export", finished, "--out", out],
            ["init", out],
        ):
            refused(cli(*words), f"{file} is a file")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("form", ["peft", "merged"])
@pytest.mark.parametrize(
    ("error", "code"), [(OSError(errno.ENOSPC, "No space left"), 3), (KeyboardInterrupt(), 130)]
)
def test_an_export_that_stops_midway_leaves_nothing(
    cli, finished, tmp_path, monkeypatch, form, error, code
):
    """The tokenizer, which comes last, cannot be written."""
    stale = tmp_path / ".out.01234567"  # of a process that was killed
    stale.mkdir()
    words = ["export", finished, "--format", form, "--out", tmp_path / "out"]

    def stop(self, folder, **options):
        assert os.listdir(folder)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", stop)
        assert cli(*words).code == code
    assert list(tmp_path.iterdir()) == [stale]
    assert cli(*words).code == 0
    assert set(tmp_path.iterdir()) == {stale, tmp_path / "out"}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "noise", "foreign"])
def test_a_corrupt_or_foreign_adapter_is_refused(cli, finished, tmp_path, name, damage):
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "adapter" / name
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[: len(data) // 2],
            "noise": os.urandom(len(data)),
            "foreign": json.dumps({"peft_type": "LORA", "r": "x"}).encode(),
        }[damage]
    )
    refused(cli("evaluate", run), "adapter")
    refused(cli("export", run, "--out", tmp_path / "out"), "adapter")


def test_an_adapter_of_another_base_is_refused(cli, finished, tmp_path):
    model = tmp_path / "model"
    from fedlora.config.job import ModelSection
    from fedlora.models.loading import load_base, load_processor

    base = load_base(ModelSection(), labels=(), pad_id=256, seed=0)
    with __import__("torch").no_grad():
        next(base.model.parameters()).add_(0.5)
    base.model.save_pretrained(model)
    load_processor(ModelSection()).tokenizer.save_pretrained(model)
    refused(cli("evaluate", finished, "--model", model), "trained on base")


def test_resume_refuses_a_folder_that_is_no_run(cli, tmp_path):
    refused(cli("resume", tmp_path), "not a run folder")
    refused(cli("inspect", tmp_path), "not a run folder")
    refused(cli("evaluate", tmp_path, "--data", "x.jsonl"), "neither an adapter folder")


def test_resume_refuses_another_job(cli, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "job.toml").read_text()
    (run / "job.toml").write_text(text.replace("local_steps = 1", "local_steps = 2"))
    refused(cli("resume", run), "is not the job that this run was started with")


def test_resume_of_a_finished_run_says_so(cli, finished):
    done = cli("resume", finished)
    assert done.code == 0
    assert "is finished" in done.out


def test_a_run_in_use_is_refused(cli, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    store = RunStore.open(run, load_job(run / "job.toml").digest())
    refused(cli("resume", run), "in use by another process")
    store.close()


def test_disk_full_in_a_round_keeps_the_committed_ones(cli, job, tmp_path, monkeypatch):
    """The spool of round 2 fails to grow; round 1 stands and the run goes on later."""
    run = tmp_path / "run"
    real, count = os.pwrite, 0

    def full(descriptor, data, offset):
        nonlocal count
        count += 1
        if count > 4:  # three clients in round 1, one in round 2
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        done = cli("simulate", job, "--out", run)
    refused(done, "No space left on device", code=3)
    assert (run / "HEAD").read_text().startswith("1 ")
    done = cli("resume", run)
    assert done.code == 0, done
    whole = tmp_path / "whole"
    cli("simulate", job, "--out", whole)
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_unknown_words_on_the_command_line(cli, job):
    assert cli("simulat").code == 2
    assert cli("simulate", job, "--outt", "x").code == 2
    refused(cli("export", job.parent, "--out", job.parent, "--format", "zip"), "peft, merged")
    refused(
        cli("compare", job, "--out", job.parent / "c", "--strategies", "fedti", "--baselines", "x"),
        "fedti",
        "'x' is not known",
    )


def test_a_comparison_does_not_go_into_a_run_folder(cli, job, finished):
    refused(cli("compare", job, "--out", finished, "--strategies", "fedit"), "something else")


def test_evaluate_does_not_divide_the_data_anew(cli, finished):
    """Rows that were trained on could end up in the test."""
    refused(cli("evaluate", finished, "-o", "data.max_rows=30"), "divide the data anew")


def test_inspect_reads_a_run_in_use_and_refuses_what_is_broken(cli, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    store = RunStore.open(run, load_job(run / "job.toml").digest())
    assert cli("inspect", run).code == 0
    store.close()
    (run / "adapter" / "adapter_config.json").write_bytes(b"\xff{")
    refused(cli("inspect", run / "adapter"), "not readable")


def test_a_folder_name_is_no_markup(cli, job, tmp_path):
    done = cli("simulate", job, "--out", tmp_path / "br[/b]", "-o", "federation.rounds=1")
    assert done.code == 0, done
    assert "br[/b]" in done.out


def test_a_report_that_was_not_written_is_written_by_resume(cli, job, tmp_path, monkeypatch):
    from fedlora.report import run_page

    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_page, "write_report", interrupted)
        assert cli("simulate", job, "--out", tmp_path / "run").code == 130
    assert cli("resume", tmp_path / "run").code == 0
    assert (tmp_path / "run" / "report.html").is_file()
