import torch

from fedlora.data.example import IGNORE, Example, collate


def text(ids, target):
    return Example({"input_ids": torch.tensor(ids)}, torch.tensor(target))


def test_texts_are_padded_on_the_right():
    batch = collate([text([5, 6, 7], [IGNORE, 6, 7]), text([8], [IGNORE])], pad_id=9)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.target.tolist() == [[IGNORE, 6, 7], [IGNORE] * 3]
    assert all(tensor.dtype == torch.int64 for tensor in [*batch.inputs.values(), batch.target])


def test_classes_are_stacked():
    batch = collate([text([5, 6], 1), text([7], 0)], pad_id=0)
    assert batch.target.tolist() == [1, 0]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_pictures_are_stacked():
    examples = [
        Example({"pixel_values": torch.full((3, 2, 2), v)}, torch.tensor(1)) for v in (0.0, 1.0)
    ]
    batch = collate(examples, pad_id=0)
    assert list(batch.inputs) == ["pixel_values"]
    assert batch.inputs["pixel_values"].shape == (2, 3, 2, 2)
    assert batch.target.tolist() == [1, 1]


def test_to_moves_every_tensor():
    batch = collate([text([5, 6], [IGNORE, 6])], pad_id=0).to("meta")
    assert {tensor.device.type for tensor in [*batch.inputs.values(), batch.target]} == {"meta"}


def test_prompt_is_what_comes_before_the_first_counted_token():
    assert text([5, 6, 7], [IGNORE, IGNORE, 7]).prompt_ids.tolist() == [5, 6]
    assert text([5, 6], [IGNORE, IGNORE]).prompt_ids.tolist() == [5, 6]
