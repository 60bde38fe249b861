import pytest
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedlora.config.job import DataSection, PartitionSection
from fedlora.data.example import IGNORE
from fedlora.data.federated import load_federated
from fedlora.errors import ConfigError, DataError

IID = PartitionSection(kind="iid", clients=2)
CLASSIFY = "sequence-classification"


def load(
    source, partition=IID, task="causal-lm", *, tokenizer=None, seed=0, processor=None, **data
):
    return load_federated(
        DataSection(source=source, **data),
        partition,
        task,
        tokenizer=tokenizer,
        image_processor=processor,
        seed=seed,
    )


def contents(examples):
    return [(e.inputs["input_ids"].tolist(), e.target.tolist(), e.num_bytes) for e in examples]


@pytest.fixture
def labelled(write):
    cells = [[f"text {n}", f"class {n % 4}"] for n in range(80)]
    return write("train.csv", [["text", "label"], *cells])


def test_builtin_clients_are_areas(tokenizer):
    loaded = load(
        "builtin:stdlib", PartitionSection(kind="natural", clients=2), tokenizer=tokenizer
    )
    assert list(loaded.clients) == ["asyncio", "email"]
    for name, client in loaded.clients.items():
        assert client.name == name
        assert client.composition == {name: sum(client.composition.values())}
        assert {len(example.target) for example in client.train[:-1]} == {128}
        assert client.validation
    assert loaded.labels == ()
    assert loaded.test == [e for client in loaded.clients.values() for e in client.validation]


def test_labelled_rows_are_all_used_once(labelled, tokenizer):
    loaded = load(labelled, task=CLASSIFY, tokenizer=tokenizer)
    assert loaded.labels == tuple(f"class {n}" for n in range(4))
    everything = []
    for client in loaded.clients.values():
        assert len(client.validation) == 4
        assert len(client.train) == 36
        assert sum(client.composition.values()) == 40
        assert set(client.composition) <= set(loaded.labels)
        everything += [*client.train, *client.validation]
    texts = sorted(tokenizer.decode(example.inputs["input_ids"]) for example in everything)
    assert texts == sorted(f"text {n}" for n in range(80))
    for example in everything:
        number = int(tokenizer.decode(example.inputs["input_ids"]).split()[1])
        assert example.target.item() == number % 4


def test_the_same_arguments_give_the_same_data(labelled, tokenizer):
    state = torch.get_rng_state()
    first, again, other = (
        load(labelled, task=CLASSIFY, tokenizer=tokenizer, seed=seed, max_rows=50)
        for seed in (5, 5, 6)
    )
    for name, client in first.clients.items():
        assert contents(client.train) == contents(again.clients[name].train)
        assert contents(client.validation) == contents(again.clients[name].validation)
    assert contents(first.test) != contents(other.test)
    assert torch.equal(state, torch.get_rng_state())
    assert sum(sum(client.composition.values()) for client in first.clients.values()) == 50
    assert len(first.labels) == 4


def test_a_client_s_validation_does_not_depend_on_the_other_clients(write, tokenizer):
    rows = [["text", "label", "site"]]
    rows += [[f"{site} {n}", "x", site] for site in "abc" for n in range(20)]
    source = write("train.csv", rows)
    three, one = (
        load(
            source,
            PartitionSection(kind="natural", column="site", clients=clients),
            CLASSIFY,
            tokenizer=tokenizer,
        )
        for clients in (3, 1)
    )
    assert contents(three.clients["a"].validation) == contents(one.clients["a"].validation)


def test_auto_follows_the_columns(write, tokenizer):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    sources = {
        "chat.jsonl": ([chat] * 4, "a</s>"),
        "completion.jsonl": ([{"prompt": "q", "completion": "a", "text": "t"}] * 4, "a</s>"),
        "text.jsonl": ([{"text": "dt"}] * 4, "t</s>"),
    }
    for name, (records, counted) in sources.items():
        loaded = load(write(name, records), tokenizer=tokenizer, packed=False)
        (example, *_) = loaded.test
        assert tokenizer.decode(example.target[example.target != IGNORE]) == counted
        assert all(client.composition == {"rows": 2} for client in loaded.clients.values())
    with pytest.raises(DataError, match=r'no column "messages", no "prompt".*columns: body'):
        load(write("other.jsonl", [{"body": "x"}]), tokenizer=tokenizer)


def test_a_test_file_is_used_instead_of_validation(labelled, write, tokenizer):
    test = write("test.csv", [["text", "label"], ["new", "class 2"], ["", "class 1"]])
    loaded = load(labelled, task=CLASSIFY, tokenizer=tokenizer, test=test)
    assert [example.target.item() for example in loaded.test] == [2]
    assert loaded.unusable.dropped == {"empty text": [f"{test}:3"]}
    assert all(client.validation for client in loaded.clients.values())
    unknown = write("unknown.csv", [["text", "label"], ["new", "class 9"]])
    with pytest.raises(DataError, match=r'unknown\.csv:2: label "class 9" is not known'):
        load(labelled, task=CLASSIFY, tokenizer=tokenizer, test=unknown)
    with pytest.raises(DataError, match=r'data\.test = "gone\.csv" does not exist'):
        load(labelled, task=CLASSIFY, tokenizer=tokenizer, test="gone.csv")


def test_named_labels_keep_their_order(labelled, tokenizer):
    names = [f"class {n}" for n in (3, 1, 0, 2)]
    loaded = load(labelled, task=CLASSIFY, tokenizer=tokenizer, labels=names)
    assert loaded.labels == tuple(names)
    with pytest.raises(DataError, match=r"train\.csv:5: label .*set data\.labels"):
        load(labelled, task=CLASSIFY, tokenizer=tokenizer, labels=["class 0", "class 1", "class 2"])
    with pytest.raises(ConfigError, match="names a class twice"):
        load(labelled, task=CLASSIFY, tokenizer=tokenizer, labels=["a", "a"])


def test_integer_labels_sort_by_value(write, tokenizer):
    source = write("train.jsonl", [{"text": "x", "label": n % 12} for n in range(48)])
    assert load(source, task=CLASSIFY, tokenizer=tokenizer).labels == tuple(map(str, range(12)))


def test_a_table_without_header_is_read_by_number(write, tokenizer):
    source = write("sst.tsv", [[str(n % 2), f"film {n}"] for n in range(20)])
    loaded = load(source, task=CLASSIFY, tokenizer=tokenizer, text="1", label="0")
    assert loaded.labels == ("0", "1")
    assert sum(sum(c.composition.values()) for c in loaded.clients.values()) == 20
    with pytest.raises(DataError, match=r'no column "text".*in a file without header'):
        load(source, task=CLASSIFY, tokenizer=tokenizer)


def test_unusable_rows_are_counted_once_and_named(write, tokenizer):
    records = [{"text": f"row {n}" if n % 5 else ""} for n in range(40)]
    source = write("train.jsonl", records)
    for packed in (True, False):
        loaded = load(source, tokenizer=tokenizer, packed=packed, max_length=4)
        lines = sorted(loaded.unusable.dropped["empty text"], key=lambda o: int(o.split(":")[-1]))
        assert lines == [f"{source}:{n + 1}" for n in range(0, 40, 5)]
        parts = [client.unusable.num_dropped for client in loaded.clients.values()]
        assert sum(parts) == loaded.unusable.num_dropped == 8
    assert loaded.unusable.counts["cut to max_length"] == len(loaded.unusable.cut) > 0


def test_rows_that_no_client_got_are_named(labelled, tokenizer):
    partition = PartitionSection(kind="pathological", clients=1, per_client=3)
    loaded = load(labelled, partition, CLASSIFY, tokenizer=tokenizer)
    assert loaded.unusable.counts == {"given to no client by the partition": 20}


def test_max_validation_counts_examples(write, tokenizer):
    source = write("train.jsonl", [{"text": "word " * 50}, *[{"text": "row"}] * 39])
    options = {"tokenizer": tokenizer, "validation_fraction": 0.5}
    for packed in (True, False):
        loaded = load(source, max_validation=3, packed=packed, max_length=8, **options)
        assert [len(client.validation) for client in loaded.clients.values()] == [3, 3]
    empty = write("empty.jsonl", [{"text": "" if n % 2 else "row"} for n in range(40)])
    loaded = load(empty, max_validation=3, packed=False, **options)
    assert [len(client.validation) for client in loaded.clients.values()] == [3, 3]


def test_small_clients_keep_a_row_to_train_on(write, tokenizer):
    rows = [["text", "label", "site"], ["a", "x", "one"], ["b", "x", "two"], ["c", "x", "two"]]
    partition = PartitionSection(kind="natural", column="site")
    loaded = load(write("train.csv", rows), partition, CLASSIFY, tokenizer=tokenizer)
    sizes = {n: (len(c.train), len(c.validation)) for n, c in loaded.clients.items()}
    assert sizes == {"one": (1, 0), "two": (1, 1)}


def test_a_client_without_training_examples_is_named(write, tokenizer):
    rows = [["text", "label", "site"], *[["a", "x", "one"]] * 4, *[["", "x", "two"]] * 4]
    with pytest.raises(DataError, match=r'client "two" has no training example: 4 rows, 1 of them'):
        load(
            write("train.csv", rows),
            PartitionSection(kind="natural", column="site"),
            CLASSIFY,
            tokenizer=tokenizer,
        )


def test_nothing_to_test_on_is_refused(write, tokenizer):
    source = write("train.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(DataError, match=r"no usable example to test on.*name a file in data\.test"):
        load(source, tokenizer=tokenizer)


def test_client_folders_of_text_and_of_pictures(write, tmp_path, tokenizer):
    folders = PartitionSection(kind="folders")
    for site in ("north", "south"):
        for n in range(3):
            write(f"texts/{site}/{n}.txt", f"text {n} of {site}")
            picture = tmp_path / "pictures" / site / f"class {n % 2}" / f"{n}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (5, 5)).save(picture)
    texts = load(str(tmp_path / "texts"), folders, tokenizer=tokenizer)
    assert list(texts.clients) == ["north", "south"]
    assert texts.clients["north"].composition == {"rows": 3}
    pictures = load(
        str(tmp_path / "pictures"),
        folders,
        "image-classification",
        processor=ViTImageProcessorPil(size={"height": 4, "width": 4}),
    )
    assert pictures.labels == ("class 0", "class 1")
    assert pictures.clients["south"].composition == {"class 0": 2, "class 1": 1}
    assert pictures.test[0].inputs["pixel_values"].shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("records", "data", "message"),
    [
        ([{"text": "a"}, {"text": 3}], {}, r'train\.jsonl:2: column "text" is a number'),
        ([{"text": "a"}, {"body": "b"}], {}, r'train\.jsonl:2: the row has no "text"'),
        ([{"messages": "hi"}], {}, r"train\.jsonl:1: .*expected a list of {role, content}"),
        ([{"text": "a"}], {"format": "chat"}, r'has no column "messages"; columns: text'),
    ],
)
def test_malformed_rows_are_refused_with_their_line(write, tokenizer, records, data, message):
    with pytest.raises(DataError, match=message):
        load(write("train.jsonl", records), tokenizer=tokenizer, **data)


def test_settings_that_do_not_fit_together_are_refused(labelled, tokenizer):
    with pytest.raises(ConfigError, match=r'"chat" does not go with model\.task = "sequence-cl'):
        load(labelled, task=CLASSIFY, tokenizer=tokenizer, format="chat")
    with pytest.raises(ConfigError, match=r"data\.max_length = 1 leaves nothing"):
        load(labelled, tokenizer=tokenizer, max_length=1)
    with pytest.raises(DataError, match=r'no column "category"; columns: text, label'):
        load(labelled, task=CLASSIFY, tokenizer=tokenizer, label="category")
