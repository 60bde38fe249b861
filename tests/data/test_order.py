import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data.example import IGNORE, Example
from fedlora.data.order import batch_order, loader
from fedlora.seeds import generator


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**40))
def test_order_is_permutation_after_permutation(num_examples, batch_size, num_batches, seed):
    order = batch_order(num_examples, batch_size, num_batches, generator(seed))
    assert [len(batch) for batch in order] == [min(batch_size, num_examples)] * num_batches
    drawn = [number for batch in order for number in batch]
    for start in range(0, len(drawn), num_examples):
        permutation = drawn[start : start + num_examples]
        assert len(set(permutation)) == len(permutation)
        assert set(permutation) <= set(range(num_examples))
    assert order == batch_order(num_examples, batch_size, num_batches, generator(seed))
    longer = batch_order(num_examples, batch_size, num_batches + 3, generator(seed))
    assert longer[:num_batches] == order


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.integers(1, 7),
    st.integers(0, 30),
    st.integers(0, 2**40),
)
def test_batches_of_like_lengths_have_every_example_once_an_epoch(lengths, size, batches, seed):
    count = len(lengths)
    order = batch_order(count, size, batches, generator(seed), lengths)
    assert [len(batch) for batch in order] == [min(size, count)] * batches
    drawn = [number for batch in order for number in batch]
    for start in range(0, len(drawn), count):
        permutation = drawn[start : start + count]
        assert len(set(permutation)) == len(permutation)
    assert order == batch_order(count, size, batches, generator(seed), lengths)
    assert order == batch_order(count, size, batches + 3, generator(seed), lengths)[:batches]


def test_batches_of_like_lengths_need_less_padding():
    lengths = torch.randint(1, 200, (640,), generator=generator(1)).tolist()

    def padding(order):
        return sum(
            max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch)
            for batch in order
        )

    plain = batch_order(640, 8, 80, generator(0))
    bucketed = batch_order(640, 8, 80, generator(0), lengths)
    assert padding(bucketed) < 0.1 * padding(plain)
    # and the lengths of batches come in no order
    longest = [max(lengths[i] for i in batch) for batch in bucketed]
    assert longest != sorted(longest)


def test_the_longest_are_not_always_left_for_the_end():
    """Else a round of fewer steps than an epoch would never see them."""
    seen = {
        number
        for seed in range(40)
        for batch in batch_order(11, 4, 2, generator(seed), list(range(11)))
        for number in batch
    }
    assert seen == set(range(11))


def test_another_seed_is_another_order():
    assert batch_order(20, 5, 4, generator(0)) != batch_order(20, 5, 4, generator(1))


@pytest.fixture
def examples():
    rows = [torch.arange(1, 2 + number % 4) * (number + 1) for number in range(11)]
    return [Example({"input_ids": row}, row.clone().fill_(IGNORE)) for row in rows]


def test_order_does_not_depend_on_workers(examples):
    order = batch_order(len(examples), 4, 7, generator(3, "order"))
    alone, helped = (list(loader(examples, order, 99, workers)) for workers in (0, 2))
    assert len(alone) == len(helped) == 7
    for ours, theirs, numbers in zip(alone, helped, order, strict=True):
        assert torch.equal(ours.inputs["input_ids"], theirs.inputs["input_ids"])
        assert torch.equal(ours.inputs["attention_mask"], theirs.inputs["attention_mask"])
        assert torch.equal(ours.target, theirs.target)
        assert ours.inputs["input_ids"][:, 0].tolist() == [number + 1 for number in numbers]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_random_streams_are_untouched(examples, num_workers):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(loader(examples, batch_order(11, 4, 3, generator(0)), 0, num_workers))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()
