"""Figures of a model against sums written out by hand."""

import math

import pytest
import torch

from fedlora.config.job import ModelSection
from fedlora.data.example import IGNORE, Example
from fedlora.evaluate import evaluate, exact_match
from fedlora.models.loading import load_base, load_processor


@pytest.fixture(scope="module")
def model(tiny_folder):
    section = ModelSection(name=str(tiny_folder), task="causal-lm")
    return load_base(section, labels=(), pad_id=0, seed=0).model


def examples():
    draws = torch.Generator().manual_seed(0)
    made = []
    for length in (5, 2, 9, 3):
        ids = torch.randint(3, 16, (length,), generator=draws)
        target = ids.clone()
        target[: max(1, length - 3)] = IGNORE
        made.append(Example({"input_ids": ids}, target, num_bytes=4 * length))
    return made


def test_figures_are_means_over_counted_tokens(model):
    total, count, correct, num_bytes = 0.0, 0, 0, 0
    for example in examples():
        with torch.no_grad():
            logits = model(input_ids=example.inputs["input_ids"][None]).logits[0].double()
        for place in (example.target != IGNORE).nonzero().flatten().tolist():
            scores = logits[place - 1].log_softmax(0)
            total -= float(scores[example.target[place]])
            correct += int(scores.argmax()) == int(example.target[place])
            count += 1
        num_bytes += example.num_bytes
    found = evaluate(model, examples(), task="causal-lm", pad_id=0, batch_size=3)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["accuracy"] == correct / count
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)


def test_neither_batch_size_nor_order_matters(model):
    left = evaluate(model, examples(), task="causal-lm", pad_id=0, batch_size=1)
    right = evaluate(model, examples()[::-1], task="causal-lm", pad_id=0, batch_size=16)
    assert left == pytest.approx(right, rel=1e-5)


def test_nothing_to_measure_gives_no_figures(model):
    assert evaluate(model, [], task="causal-lm", pad_id=0, batch_size=4) == {}
    blank = [Example({"input_ids": torch.tensor([3, 4])}, torch.tensor([IGNORE, IGNORE]))]
    assert evaluate(model, blank, task="causal-lm", pad_id=0, batch_size=4) == {}


def test_the_model_s_mode_is_left_as_it_was(model):
    for mode in (True, False):
        model.train(mode)
        evaluate(model, examples(), task="causal-lm", pad_id=0, batch_size=4)
        assert model.training == mode


def test_exact_match_counts_equal_greedy_completions(model, tiny_folder):
    tokenizer = load_processor(ModelSection(name=str(tiny_folder))).tokenizer
    ids = torch.tensor([5, 6, 7, 8])
    target = torch.tensor([IGNORE, IGNORE, 7, 8])
    asked = Example({"input_ids": ids}, target, answer="x")
    with torch.no_grad():
        output = model.generate(
            input_ids=ids[None, :2],
            attention_mask=torch.ones(1, 2, dtype=torch.int64),
            do_sample=False,
            max_new_tokens=3,
            pad_token_id=0,
        )
    text = tokenizer.decode(output[0, 2:], skip_special_tokens=True)
    right = Example({"input_ids": ids}, target, answer=f" {text}\n")
    rest = Example({"input_ids": ids}, target)

    def share(given):
        return exact_match(model, tokenizer, given, pad_id=0, max_new_tokens=3)

    assert share([right, asked, rest]) == 0.5
    assert share([rest]) is None
