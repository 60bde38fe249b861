import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedlora.data.folders import read_client_folders, read_folder
from fedlora.data.hub import read_hub
from fedlora.data.source import read_source
from fedlora.errors import DataError


def test_builtin_rows_have_text_and_area():
    table = read_source("builtin:stdlib", client_folders=False, text="body")
    assert table.columns == ("body", "area")
    assert {row.values["area"] for row in table.rows} >= {"asyncio", "email"}
    assert all(row.origin.startswith("builtin:stdlib/") for row in table.rows)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:stdlb", r'"builtin:stdlb" is not known \(did you mean "builtin:stdlib"\?\)'),
        (
            "trian.csv",
            r'"trian\.csv" does not exist \(did you mean "train\.csv"\?\); expected a file',
        ),
        ("./nowhere", r'"\./nowhere" does not exist'),
        ("train.csv/..", r"does not exist|expected a folder"),
    ],
)
def test_unknown_sources_are_named(write, tmp_path, monkeypatch, source, message):
    write("train.csv", [["text"], ["a"]])
    monkeypatch.chdir(tmp_path)
    if source.endswith(".."):
        source = str(tmp_path / "absent")
    with pytest.raises(DataError, match=message):
        read_source(source, client_folders=False)


def test_a_folder_of_data_files_is_their_rows_in_order_of_name(write, tmp_path):
    write("d/b.jsonl", [{"text": "three"}])
    write("d/a.csv", [["text", "label"], ["one", "x"], ["two", "y"]])
    write("d/c.txt", "four")
    write("d/README.md", "no data")
    write("d/.hidden.csv", [["x"]])
    table = read_folder(tmp_path / "d")
    assert [row.values["text"] for row in table.rows] == ["one", "two", "three", "four"]
    assert table.columns == ("text", "label")
    assert table.rows[3].origin.endswith("c.txt")


def test_class_folders_of_pictures_are_labelled(tmp_path):
    for name in ("cat/1.png", "dog/2.jpg", "dog/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("x")
    table = read_folder(tmp_path, image="picture", label="animal")
    assert table.columns == ("picture", "animal")
    assert [row.values["animal"] for row in table.rows] == ["cat", "dog", "dog"]
    assert [row.origin.rsplit("/", 2)[1:] for row in table.rows] == [
        ["cat", "1.png"],
        ["dog", "1.png"],
        ["dog", "2.jpg"],
    ]


def test_client_folders_mark_their_rows(write, tmp_path):
    write("d/south/a.csv", [["text"], ["one"]])
    write("d/north/a.txt", "two")
    write("d/north/b.txt", "three")
    table = read_client_folders(tmp_path / "d")
    assert [(row.client, row.values["text"]) for row in table.rows] == [
        ("north", "two"),
        ("north", "three"),
        ("south", "one"),
    ]


def test_folders_without_data_are_named(write, tmp_path):
    write("d/site/a.csv", [["text"], ["one"]])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r'sub-folders with data files \(site\).*kind = "folders"'):
        read_folder(tmp_path / "d")
    with pytest.raises(DataError, match=r"empty: found no data; expected data files \(\.jsonl"):
        read_folder(tmp_path / "empty")
    with pytest.raises(DataError, match=r"empty: no sub-folders found; expected one per client"):
        read_client_folders(tmp_path / "empty")
    with pytest.raises(DataError, match="expected a folder"):
        read_client_folders(tmp_path / "d" / "site" / "a.csv")


def test_hub_class_numbers_become_names(tmp_path, monkeypatch):
    """The hub reader on a data set folder of this machine, which it treats alike."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features)
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set" / "train.parquet")
    table = read_hub(str(tmp_path / "set"), None, "train")
    assert [row.values["label"] for row in table.rows] == ["pos", "neg", None]
    assert table.rows[1].origin == f"{tmp_path / 'set'}[train]:2"
    with pytest.raises(DataError, match=r"split test.*could not be loaded"):
        read_hub(str(tmp_path / "set"), None, "test")


def test_unreachable_hub_sets_are_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r'"no-owner/no-set" \(subset x, split train\).*offline'):
        read_source("no-owner/no-set", client_folders=False, subset="x")


def test_rows_may_lack_columns_that_are_not_asked_for(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    table = read_source(str(tmp_path / "a.parquet"), client_folders=False)
    assert table.column("text", "data.text") == ["a"]
    with pytest.raises(
        DataError, match=r'no column "txt" \(did you mean "text"\?\); columns: text'
    ):
        table.column("txt", "data.text")
