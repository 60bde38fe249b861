import io

import pytest
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedlora.data.labelled import LabelledImage, LabelledText, Labels, sorted_names
from fedlora.data.rows import Row
from fedlora.errors import DataError

LABELS = Labels(["bad", "good"], "label")


def rows(*pairs, column="text", folder=None):
    return [
        Row({column: value, "label": label}, f"train.csv:{number}", folder)
        for number, (value, label) in enumerate(pairs, 2)
    ]


def test_names_sort_by_value_when_all_are_integers():
    assert sorted_names(["10", "9", "-1", "9"]) == ("-1", "9", "10")
    assert sorted_names(["10", "9", "b"]) == ("10", "9", "b")


def test_texts_keep_their_special_tokens_when_cut(word_tokenizer):
    encoder = LabelledText(word_tokenizer, 5, LABELS, text="text")
    examples, unusable = encoder.encode(
        rows(("good playing", "good"), ("a a a a a a", "bad"), (" ", "bad"), ("a", ""), ("a", None))
    )
    decoded = [word_tokenizer.decode(example.inputs["input_ids"]) for example in examples]
    assert decoded == ["[CLS] good playing [SEP]", "[CLS] a a a [SEP]"]
    assert [example.target.item() for example in examples] == [1, 0]
    assert all(example.target.shape == () and example.num_bytes == 0 for example in examples)
    assert unusable.cut == ["train.csv:3"]
    assert unusable.dropped == {
        "empty text": ["train.csv:4"],
        "empty label": ["train.csv:5", "train.csv:6"],
    }


def test_classes_may_be_given_by_number_when_no_name_is_a_number():
    assert [LABELS.index(row) for row in rows(("", 1), ("", "0"), ("", "good"))] == [1, 0, 1]
    digits = Labels(["7", "3"], "label")
    assert [digits.index(row) for row in rows(("", 3), ("", "7"))] == [1, 0]
    with pytest.raises(DataError, match='label "0" is not known'):
        digits.index(rows(("", 0))[0])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            1.5,
            r'train\.csv:2: column "label" is a number \(1\.5\); expected a string or an integer',
        ),
        (True, r'train\.csv:2: column "label" is a truth value'),
        (["good"], r'train\.csv:2: column "label" is a list'),
        ("god", r'train\.csv:2: label "god" is not known \(did you mean "good"\?\); expected one'),
        (2, r'train\.csv:2: label "2" is not known'),
    ],
)
def test_malformed_labels_are_refused_with_their_line(word_tokenizer, label, message):
    with pytest.raises(DataError, match=message):
        LabelledText(word_tokenizer, 5, LABELS, text="text").check(rows(("a", label))[0])


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessorPil(size={"height": 4, "width": 6})


def encoded(mode):
    buffer = io.BytesIO()
    Image.new(mode, (9, 7)).save(buffer, "png")
    return buffer.getvalue()


def test_pictures_of_every_kind_become_pixels(processor, tmp_path):
    (tmp_path / "grey.png").write_bytes(encoded("L"))
    data = rows(
        ("grey.png", "bad"),
        (str(tmp_path / "grey.png"), "good"),
        (encoded("RGBA"), "good"),
        ({"bytes": encoded("P"), "path": None}, "bad"),
        ({"bytes": None, "path": "grey.png"}, "bad"),
        (Image.new("1", (5, 5)), "good"),
        column="image",
        folder=tmp_path,
    )
    encoder = LabelledImage(processor, LABELS, image="image")
    for row in data:
        encoder.check(row)
    examples, unusable = encoder.encode(data)
    assert [example.target.item() for example in examples] == [0, 1, 1, 0, 0, 1]
    for example in examples:
        assert example.inputs["pixel_values"].shape == (3, 4, 6)
        assert example.inputs["pixel_values"].dtype == torch.float32
        # black, normalised with mean and deviation 0.5
        torch.testing.assert_close(example.inputs["pixel_values"], torch.full((3, 4, 6), -1.0))
    assert not unusable.counts


def test_unreadable_pictures_are_named(processor, tmp_path):
    (tmp_path / "cut.png").write_bytes(encoded("RGB")[:40])
    data = rows(
        ("cut.png", "bad"),
        ("absent.png", "bad"),
        (b"no picture", "bad"),
        (None, "bad"),
        (encoded("RGB"), None),
        (encoded("RGB"), "good"),
        column="image",
        folder=tmp_path,
    )
    examples, unusable = LabelledImage(processor, LABELS, image="image").encode(data)
    assert len(examples) == 1
    assert unusable.dropped == {
        "unreadable picture": [f"train.csv:{number}" for number in (2, 3, 4, 5)],
        "empty label": ["train.csv:6"],
    }


@pytest.mark.parametrize("value", [3, ["a"], {"path": 3}])
def test_pictures_of_another_type_are_refused_with_their_line(processor, value):
    with pytest.raises(DataError, match=r'train\.csv:2: column "image" is .*expected a picture'):
        LabelledImage(processor, LABELS, image="image").check(
            rows((value, "bad"), column="image")[0]
        )
