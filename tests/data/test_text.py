import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.data.example import IGNORE
from fedlora.data.rows import Row
from fedlora.data.text import Completion, PackedText, PlainText
from fedlora.data.tokens import tokenise
from fedlora.errors import DataError

DOCUMENTS = ["The quick brown fox.", "日本語 text 🙂", "", "the lazy dog"]


def rows(*records):
    return [Row(record, f"file.jsonl:{number}") for number, record in enumerate(records, 1)]


def documents(*texts):
    return rows(*({"text": text} for text in texts))


def counted(example):
    return example.target[example.target != IGNORE]


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.text(max_size=30), max_size=8), st.integers(2, 20))
def test_packing_loses_no_token(tokenizer, texts, max_length):
    examples, _ = PackedText(tokenizer, max_length, text="text").encode(documents(*texts))
    filled = [text for text in texts if text.strip()]
    end = tokenizer.eos_token_id
    expected = [token for ids in tokenise(tokenizer, filled) for token in [*ids, end]]
    packed = [token for example in examples for token in example.inputs["input_ids"].tolist()]
    # one token alone has nothing to predict
    assert packed == (expected[:-1] if len(expected) % max_length == 1 else expected)
    assert all(len(example.target) == max_length for example in examples[:-1])
    for example in examples:
        ids = example.inputs["input_ids"]
        assert 2 <= len(ids) <= max_length
        assert example.target.tolist() == [IGNORE, *ids[1:].tolist()]


def test_packed_bytes_are_those_of_the_counted_text(tokenizer):
    examples, unusable = PackedText(tokenizer, 1000, text="text").encode(documents(*DOCUMENTS))
    (example,) = examples
    whole = sum(len(text.encode()) for text in DOCUMENTS)
    first = len(tokenizer.decode(example.inputs["input_ids"][:1]).encode())
    assert example.num_bytes == whole - first
    assert unusable.dropped == {"empty text": ["file.jsonl:3"]}
    blocks, _ = PackedText(tokenizer, 7, text="text").encode(documents(*DOCUMENTS))
    assert all(block.num_bytes <= 7 * 4 for block in blocks)


def test_each_packed_document_begins_as_the_tokenizer_begins_it(start_tokenizer):
    (example,), _ = PackedText(start_tokenizer, 1000, text="text").encode(documents("one", "two"))
    assert start_tokenizer.decode(example.inputs["input_ids"]) == "<s>one</s><s>two</s>"
    assert example.num_bytes == 6


def test_unpacked_documents_are_one_example_each(tokenizer):
    encoder = PlainText(tokenizer, 12, text="text")
    long = "fox " * 20
    examples, unusable = encoder.encode(documents("dog", " \n", long, None))
    decoded = [tokenizer.decode(example.inputs["input_ids"]) for example in examples]
    assert decoded[0] == "dog</s>"
    assert long.startswith(decoded[1])
    assert len(examples[1].target) == 12
    assert unusable.dropped == {"empty text": ["file.jsonl:2", "file.jsonl:4"]}
    assert unusable.cut == ["file.jsonl:3"]
    assert unusable.counts == {"empty text": 2, "cut to max_length": 1}
    assert unusable.num_dropped == 2


@pytest.mark.parametrize("name", ["tokenizer", "start_tokenizer", "sentence_tokenizer"])
@pytest.mark.parametrize("completion", ["4", " the lazy dog", "Ü 日本 🙂\n#### 4"])
def test_loss_counts_exactly_the_completion(name, completion, request):
    tokenizer = request.getfixturevalue(name)
    encoder = Completion(tokenizer, 500, prompt="q", completion="a")
    (example,), unusable = encoder.encode(rows({"q": "2 + 2 is café", "a": completion}))
    assert tokenizer.decode(counted(example)) == completion + "</s>"
    assert tokenizer.decode(example.prompt_ids, skip_special_tokens=True) == "2 + 2 is café"
    assert torch.equal(example.prompt_ids, example.inputs["input_ids"][: len(example.prompt_ids)])
    assert example.num_bytes == len(completion.encode())
    assert example.answer == completion
    assert not unusable.counts


def test_unusable_completions_are_named_by_reason(tokenizer):
    encoder = Completion(tokenizer, 10, prompt="q", completion="a")
    examples, unusable = encoder.encode(
        rows(
            {"q": "x", "a": ""},
            {"q": "", "a": "y"},
            {"q": "0123456789", "a": "y"},
            {"q": "012345678", "a": "yz"},
            {"q": "x", "a": "y"},
        )
    )
    assert unusable.dropped == {
        "empty completion": ["file.jsonl:1"],
        "empty prompt": ["file.jsonl:2"],
        "nothing left of the completion within max_length": ["file.jsonl:3"],
    }
    assert unusable.cut == ["file.jsonl:4"]
    assert [tokenizer.decode(counted(example)) for example in examples] == ["y", "y</s>"]
    assert [example.answer for example in examples] == ["yz", "y"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r'file\.jsonl:1: column "text" is a number \(3\); expected a string'),
        (["a"], r'file\.jsonl:1: column "text" is a list; expected a string'),
        (True, r"is a truth value \(true\)"),
        ("a\ud800", r"file\.jsonl:1: .*half a surrogate pair at character 2"),
    ],
)
def test_text_of_another_type_is_refused_with_its_line(tokenizer, value, message):
    for encoder in (
        PackedText(tokenizer, 8, text="text"),
        Completion(tokenizer, 8, prompt="text", completion="text"),
    ):
        with pytest.raises(DataError, match=message):
            encoder.check(documents(value)[0])


def test_a_row_without_the_column_is_refused_with_its_line(tokenizer):
    with pytest.raises(DataError, match=r'file\.jsonl:1: the row has no "text".*found body'):
        PlainText(tokenizer, 8, text="text").check(rows({"body": "x"})[0])


def test_a_tokenizer_without_end_token_is_refused(word_tokenizer):
    with pytest.raises(DataError, match="no end-of-text token"):
        PackedText(word_tokenizer, 8, text="text")
