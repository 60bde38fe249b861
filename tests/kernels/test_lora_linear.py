"""Stacked LoRA linears against plain autograd, every operation by itself, in float64."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fedlora.ops.dropout_mask import Dropout
from fedlora.ops.lora_linear import lora_linear, lora_linears
from tests.kernels import low_rank
from tests.kernels.close import assert_close
from tests.kernels.conftest import GPU
from tests.kernels.low_rank import normal, plain

SCALES = (2.0, 0.5, 1.0)
OUTS, RANKS, INP = (7, 9, 12), (3, 2, 5), 20
KEY = 1 << 61 | 12345


class Setting:
    """Linears of one input: with and without a bias, and one whose weight is stored transposed."""

    def __init__(self, n=3, kind=torch.float64, factors=None, lead=(2, 5)):
        factors = factors or kind
        self.x = normal(*lead, INP, seed=0, dtype=kind).requires_grad_()
        self.weights = [normal(d, INP, seed=1 + i, dtype=kind) for i, d in enumerate(OUTS[:n])]
        if n > 1:
            self.weights[1] = self.weights[1].T.contiguous().T
        self.biases = [normal(d, seed=4, dtype=kind) for d in OUTS[:n]]
        if n > 1:
            self.biases[1] = None
        self.a_s = [normal(r, INP, seed=5 + i, dtype=factors) for i, r in enumerate(RANKS[:n])]
        self.b_s = [
            normal(d, r, seed=8 + i, dtype=factors)
            for i, (d, r) in enumerate(zip(OUTS[:n], RANKS[:n], strict=True))
        ]
        self.scales = SCALES[:n]
        self.gs = [normal(*lead, d, seed=11 + i) for i, d in enumerate(OUTS[:n])]
        for factor in (*self.a_s, *self.b_s):
            factor.requires_grad_()

    @property
    def inputs(self):
        return self.x, *self.a_s, *self.b_s

    def run(self, dropout=None):
        return lora_linears(
            self.x, self.weights, self.biases, self.a_s, self.b_s, self.scales, dropout
        )

    def grads(self, ys):
        return torch.autograd.grad(
            ys, self.inputs, [g.to(y.dtype) for g, y in zip(self.gs, ys, strict=True)]
        )

    def expected(self, mask=None):
        """(outputs, gradients) in float64."""
        x, *factors = (t.detach().double().requires_grad_() for t in self.inputs)
        n = len(self.weights)
        ys = [
            plain(x, w.double(), None if c is None else c.double(), a, b, s, mask)
            for w, c, a, b, s in zip(
                self.weights, self.biases, factors[:n], factors[n:], self.scales, strict=True
            )
        ]
        return ys, torch.autograd.grad(ys, (x, *factors), self.gs)


def dropout(rate=0.3):
    return Dropout(rate, torch.tensor(KEY), 5, 77)


def mask_of(setting, rate=0.3):
    kept = low_rank.mask_of(dropout(rate), setting.x[..., 0].numel(), INP)
    return kept.view(setting.x.shape).double() * dropout(rate).upscale


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("lead", [(2, 5), (3,), (2, 1, 2), (0,)], ids=str)
def test_equals_plain_autograd(n, lead):
    setting = Setting(n, lead=lead)
    ys, grads = setting.expected()
    found = setting.run()
    for y, expected in zip(found, ys, strict=True):
        assert_close(y, expected, 1e-13)
    for grad, expected in zip(setting.grads(found), grads, strict=True):
        assert_close(grad, expected, 1e-13)


@pytest.mark.parametrize(
    ("kind", "bound"),
    [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 4e-3 if GPU else 8e-3)],
    ids=str,
)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_short_formats(impl, kind, bound, rate):
    """Masters are float32; their gradients too. Outputs add two rounded numbers."""
    setting = Setting(3, kind, torch.float32, lead=(2, 19))
    ys, grads = setting.expected(mask_of(setting, rate) if rate else None)
    found = setting.run(dropout(rate) if rate else None)
    for y, expected in zip(found, ys, strict=True):
        assert y.dtype == kind
        assert_close(y, expected, 1.5 * bound)
    for grad, expected, t in zip(setting.grads(found), grads, setting.inputs, strict=True):
        assert grad.dtype == t.dtype
        assert_close(grad, expected, 1.5 * bound)


def test_dropout_equals_plain_autograd_with_its_mask():
    setting = Setting()
    ys, grads = setting.expected(mask_of(setting))
    found = setting.run(dropout())
    for y, expected in zip((*found, *setting.grads(found)), (*ys, *grads), strict=True):
        assert_close(y, expected, 1e-13)


def test_together_equals_one_by_one():
    setting = Setting()
    arguments = zip(
        setting.weights, setting.biases, setting.a_s, setting.b_s, setting.scales, strict=True
    )
    alone = [lora_linear(setting.x, *each, dropout()) for each in arguments]
    for y, expected in zip(setting.run(dropout()), alone, strict=True):
        assert_close(y, expected, 1e-14)


def test_stacked_in_memory_is_the_same():
    setting = Setting()
    stacked = torch.cat(setting.a_s).detach().requires_grad_()
    ys = lora_linears(
        setting.x, setting.weights, setting.biases, stacked, setting.b_s, setting.scales
    )
    (da,) = torch.autograd.grad(ys, stacked, setting.gs)
    assert_close(da, torch.cat(setting.grads(setting.run())[1:4]), 1e-14)


def test_gradcheck():
    setting = Setting(2, lead=(3,))

    def run(x, a0, a1, b0, b1):
        return lora_linears(
            x, setting.weights, setting.biases, (a0, a1), (b0, b1), setting.scales, dropout()
        )

    assert torch.autograd.gradcheck(run, setting.inputs)


def test_an_output_that_is_not_used():
    setting = Setting()
    ys = setting.run()
    grads = torch.autograd.grad(ys[1], setting.inputs, setting.gs[1], allow_unused=True)
    alone = Setting()
    (y,) = lora_linears(
        alone.x, alone.weights[1:2], [None], alone.a_s[1:2], alone.b_s[1:2], SCALES[1:2]
    )
    inputs = (alone.x, alone.a_s[1], alone.b_s[1])
    expected = torch.autograd.grad(y, inputs, alone.gs[1])
    for found, wanted in zip((grads[0], grads[2], grads[5]), expected, strict=True):
        assert_close(found, wanted, 1e-14)
    assert grads[4] is None
    assert grads[6] is None
    assert not grads[1].any()


def kept_by(run):
    """(result, tensors kept for backward)."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made = run()
    return made, kept


@pytest.mark.parametrize("frozen", ["x", "a", "b"])
def test_what_is_frozen_has_no_gradient_and_keeps_nothing(frozen):
    setting = Setting(1)
    fixed = {"x": setting.x, "a": setting.a_s[0], "b": setting.b_s[0]}[frozen]
    _, grads = setting.expected()
    fixed.requires_grad_(False)
    ys, kept = kept_by(setting.run)
    trained = [t for t in setting.inputs if t.requires_grad]
    found = torch.autograd.grad(ys, trained, setting.gs)
    wanted = [g for t, g in zip(setting.inputs, grads, strict=True) if t.requires_grad]
    for grad, expected in zip(found, wanted, strict=True):
        assert_close(grad, expected, 1e-13)
    shapes = [tuple(t.shape) for t in kept]
    assert ((10, INP) in shapes) == (frozen != "a")
    assert ((10, RANKS[0]) in shapes) == (frozen != "b")


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_input_is_kept_once_and_never_widened(rate):
    setting = Setting(3, torch.bfloat16, torch.float32, lead=(40,))
    _, kept = kept_by(lambda: setting.run(dropout(rate)))
    rows = [t for t in kept if t.shape and t.shape[0] == 40]
    # a processor keeps the mask as well, in bytes
    floats = [t for t in rows if t.dtype != torch.bool]
    assert sorted(t.shape[1] for t in floats) == [sum(RANKS), INP]
    assert all(t.dtype == torch.bfloat16 for t in floats)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(impl, base):
    """bfloat16 products of float32 inputs, as torch's own linear makes them."""
    setting = Setting(3, torch.float32, lead=(2, 19))
    setting.weights = [w.to(base) for w in setting.weights]
    ys, grads = setting.expected()
    with torch.autocast(setting.x.device.type, torch.bfloat16):
        found = setting.run()
    for y, expected in zip(found, ys, strict=True):
        assert y.dtype == torch.bfloat16
        assert_close(y, expected, 1.2e-2)
    for grad, expected in zip(setting.grads(found), grads, strict=True):
        assert grad.dtype == torch.float32
        assert_close(grad, expected, 1.2e-2)


def test_autocast_leaves_float64_alone():
    setting = Setting()
    with torch.autocast(setting.x.device.type, torch.bfloat16):
        assert all(y.dtype == torch.float64 for y in setting.run())


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_checkpointing_changes_no_bit(rate):
    setting = Setting()
    ys = setting.run(dropout(rate))
    again = checkpoint(setting.run, dropout(rate), use_reentrant=False)
    for found, wanted in zip(
        (*again, *setting.grads(again)), (*ys, *setting.grads(ys)), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_compiles_without_a_break(rate):
    setting = Setting()
    torch._dynamo.reset()
    compiled = torch.compile(setting.run, fullgraph=True, backend="aot_eager")
    ys, again = setting.run(dropout(rate)), compiled(dropout(rate))
    for found, wanted in zip(
        (*again, *setting.grads(again)), (*ys, *setting.grads(ys)), strict=True
    ):
        assert_close(found, wanted, 1e-14)


def test_a_second_derivative_is_refused():
    setting = Setting(1)
    (y,) = setting.run()
    (dx,) = torch.autograd.grad(y.square().sum(), setting.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_trained_weight_is_refused():
    setting = Setting(1)
    setting.weights[0].requires_grad_()
    with pytest.raises(AssertionError, match="weight has a gradient"):
        setting.run()
