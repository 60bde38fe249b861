"""The chunked loss of a frozen head against cross-entropy over all logits, in float64."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora.ops import linear_ce as op
from fedlora.ops.linear_ce import IGNORE, linear_ce
from tests.kernels.close import assert_close, seeded


def whole(hidden, weight, bias, target):
    """The losses and hits from all logits at once, in float64."""
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    flat = target.flatten()
    losses = F.cross_entropy(logits.flatten(0, -2), flat, ignore_index=IGNORE, reduction="none")
    return losses.view_as(target), (logits.argmax(-1) == target)


def made(rows, width, vocabulary, *, bias=False, dtype=torch.float32, ignored=0.3):
    stream = seeded(rows * 7919 + vocabulary)
    hidden = torch.randn(rows, width, generator=stream).to(dtype)
    weight = (2.0 * torch.randn(vocabulary, width, generator=stream) / width**0.5).to(dtype)
    offset = torch.randn(vocabulary, generator=stream).to(dtype) if bias else None
    target = torch.randint(0, vocabulary, (rows,), generator=stream)
    # some that are right
    target[::2] = (hidden[::2] @ weight.T).argmax(-1)
    target[torch.rand(rows, generator=stream) < ignored] = IGNORE
    return hidden, weight, offset, target


CASES = {
    "odd": (37, 24, 131),
    "one block": (8, 16, 64),
    "one row": (1, 16, 50),
    "one token": (5, 16, 1),
    "no row": (0, 16, 50),
    "several blocks": (6, 16, 4096 + 77),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_losses_hits_and_gradient(impl, case, bias):
    """Oracle: `whole`, each row's loss times its own upstream number."""
    hidden, weight, offset, target = made(*CASES[case], bias=bias)
    upstream = torch.randn(len(hidden), generator=seeded(5))
    ours, reference = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    losses, right = linear_ce(ours, weight, offset, target)
    expected, hits = whole(reference, weight, offset, target)
    assert torch.equal(right, hits)
    assert not losses[target == IGNORE].any()
    assert_close(losses, expected, 1e-5)
    (losses * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert_close(ours.grad, reference.grad, 1.5e-5)
    assert not ours.grad[target == IGNORE].any()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_narrow_numbers(impl, dtype, bound):
    hidden, weight, _, target = made(37, 24, 131, dtype=dtype)
    ours, reference = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    losses, _ = linear_ce(ours, weight, None, target)
    expected, _ = whole(reference, weight, None, target)
    assert losses.dtype == torch.float32
    assert_close(losses, expected, bound)
    losses.sum().backward()
    expected.sum().backward()
    assert_close(ours.grad, reference.grad, 1.5 * bound)


def test_chunks_change_nothing(impl, monkeypatch):
    hidden, weight, _, target = made(37, 24, 131)
    at_once = linear_ce(hidden.requires_grad_(), weight, None, target)
    slopes = torch.autograd.grad(at_once[0].sum(), hidden)[0]
    monkeypatch.setattr(op, "CHUNK", 5 * 131)
    in_parts = linear_ce(hidden, weight, None, target)
    assert torch.equal(in_parts[1], at_once[1])
    assert_close(in_parts[0], at_once[0], 1e-6)
    assert_close(torch.autograd.grad(in_parts[0].sum(), hidden)[0], slopes, 1e-6)


class Largest(TorchDispatchMode):
    """Notes the most entries of any tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(op, "CHUNK", 5 * 131)
    hidden, weight, _, target = made(37, 4, 131)
    with Largest() as seen:
        # below the registration, whose inside is hidden
        op._rows._init_fn(hidden, weight, None, target, True)
    assert seen.entries == 5 * 131


def test_shape_is_that_of_the_target(impl):
    hidden, weight, _, target = made(36, 24, 131)
    flat = linear_ce(hidden, weight, None, target)
    stacked = linear_ce(hidden.view(4, 9, 24), weight, None, target.view(4, 9))
    assert torch.equal(stacked[0].flatten(), flat[0])
    assert torch.equal(stacked[1].flatten(), flat[1])


def test_all_rows_ignored(impl):
    hidden, weight, _, target = made(9, 24, 131, ignored=2.0)
    losses, right = linear_ce(hidden.requires_grad_(), weight, None, target)
    losses.sum().backward()
    assert not losses.any()
    assert not right.any()
    assert not hidden.grad.any()


def test_rows_that_do_not_count_may_hold_anything(impl):
    hidden, weight, _, target = made(37, 24, 131)
    clean, _ = linear_ce(hidden, weight, None, target)
    hidden[target == IGNORE] = float("nan")
    assert torch.equal(linear_ce(hidden, weight, None, target)[0], clean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_its_row(impl, bad):
    hidden, weight, _, target = made(37, 24, 131, ignored=0.0)
    clean, _ = linear_ce(hidden, weight, None, target)
    hidden[3] = bad
    losses, _ = linear_ce(hidden, weight, None, target)
    others = torch.arange(37) != 3
    assert not losses[3].isfinite()
    assert torch.equal(losses[others], clean[others])


def test_logits_of_minus_infinity_are_impossible_tokens(impl):
    """A bias may forbid tokens, whole blocks of them too."""
    hidden, weight, _, target = made(6, 16, 4096 + 77, ignored=0.0)
    forbidden = torch.zeros(len(weight))
    forbidden[:4096] = -float("inf")
    target = target % 77 + 4096
    ours, reference = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    losses, _ = linear_ce(ours, weight, forbidden, target)
    expected, _ = whole(reference, weight, forbidden, target)
    assert_close(losses, expected, 1e-5)
    losses.sum().backward()
    expected.sum().backward()
    assert_close(ours.grad, reference.grad, 1.5e-5)


def test_of_equal_logits_the_first_is_the_answer(impl):
    hidden, weight = torch.ones(3, 8), torch.ones(4096 + 77, 8)
    _, right = linear_ce(hidden, weight, None, torch.tensor([0, 1, 4096]))
    assert right.tolist() == [True, False, False]


def test_gradcheck():
    hidden, weight, bias, target = made(7, 5, 11, bias=True, dtype=torch.float64)
    losses = lambda x: linear_ce(x, weight, bias, target)[0]  # noqa: E731
    assert torch.autograd.gradcheck(losses, hidden.requires_grad_())


def test_a_second_derivative_is_refused():
    """It would not be zero, which is all that could be said without the logits."""
    hidden, weight, _, target = made(7, 5, 11)
    losses, _ = linear_ce(hidden.requires_grad_(), weight, None, target)
    slopes = torch.autograd.grad(losses.sum(), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        slopes.square().sum().backward()


def test_autocast_is_that_of_the_plain_head():
    hidden, weight, _, target = made(37, 24, 131)
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    with torch.autocast(hidden.device.type, torch.bfloat16):
        losses, _ = linear_ce(ours, weight, None, target)
        logits = F.linear(plain, weight)
        expected = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")
    assert logits.dtype == torch.bfloat16
    assert_close(losses, expected, 1e-6)
    losses.sum().backward()
    expected.sum().backward()
    assert ours.grad.dtype == torch.float32
    assert_close(ours.grad, plain.grad, 6e-3)


@pytest.mark.parametrize("slopes", [False, True])
def test_registration(slopes):
    hidden, weight, bias, target = made(7, 5, 11, bias=True)
    torch.library.opcheck(op._rows, (hidden.requires_grad_(slopes), weight, bias, target, slopes))


def test_compiles_without_a_break():
    hidden, weight, _, target = made(37, 24, 131)
    hidden.requires_grad_()
    compiled = torch.compile(linear_ce, fullgraph=True, backend="aot_eager")
    losses, right = compiled(hidden, weight, None, target)
    expected, hits = linear_ce(hidden, weight, None, target)
    assert torch.equal(losses, expected)
    assert torch.equal(right, hits)
    slopes = torch.autograd.grad(losses.sum(), hidden)[0]
    assert torch.equal(slopes, torch.autograd.grad(expected.sum(), hidden)[0])
