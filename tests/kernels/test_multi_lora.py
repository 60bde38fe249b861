"""Several clients' rows at once against `lora_linear` on each client's own."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fedlora.ops.lora_linear import lora_linear
from fedlora.ops.multi_lora import multi_lora, multi_loras
from tests.kernels.close import assert_close
from tests.kernels.conftest import GPU
from tests.kernels.low_rank import CASES, normal

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3 if GPU else 1.2e-2}


class Setting:
    def __init__(self, case, kind=torch.float64, factors=None, bias=True):
        factors = factors or kind
        self.case = case
        clients = len(case.sizes)
        self.x = normal(case.rows, case.inp, seed=0, dtype=kind).requires_grad_()
        self.weight = normal(case.inp, case.out, seed=1, dtype=kind).T
        self.bias = normal(case.out, seed=2, dtype=kind) if bias else None
        self.a = normal(clients, case.rank, case.inp, seed=3, dtype=factors).requires_grad_()
        self.b = normal(clients, case.out, case.rank, seed=4, dtype=factors).requires_grad_()
        self.scale = 1.25
        self.g = normal(case.rows, case.out, seed=5, dtype=kind)

    @property
    def inputs(self):
        return self.x, self.a, self.b

    def dropout(self, rate):
        return self.case.dropout(rate)

    def run(self, rate=0.0, way=None):
        return multi_lora(
            self.x,
            self.weight,
            self.bias,
            *self.inputs[1:],
            self.scale,
            self.case.sizes,
            self.dropout(rate),
            way=way,
        )

    def alone(self, rate=0.0):
        """Client by client."""
        keys, dropout = self.case.keys(), self.dropout(rate)
        return torch.cat(
            [
                lora_linear(
                    rows,
                    self.weight,
                    self.bias,
                    self.a[i],
                    self.b[i],
                    self.scale,
                    dropout and replace(dropout, key=keys[i]),
                )
                for i, rows in enumerate(self.x.split(self.case.sizes))
            ]
        )

    def results(self, y):
        return y, *torch.autograd.grad(y, self.inputs, self.g.to(y.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("kind", list(BOUNDS), ids=str)
def test_every_client_gets_what_it_gets_alone(impl, case, rate, kind, monkeypatch):
    factors = torch.float64 if kind == torch.float64 else torch.float32
    setting = Setting(case, kind, factors)
    found = setting.results(setting.run(rate))
    monkeypatch.setenv("FEDLORA_OPS", "torch")
    expected = setting.results(setting.alone(rate))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, BOUNDS[kind])


@pytest.mark.parametrize("way", ["loop", "padded", "masked"])
def test_every_way_is_the_same(way):
    setting = Setting(CASES[0], bias=False)
    for one, other in zip(
        setting.results(setting.run(0.3, way)), setting.results(setting.alone(0.3)), strict=True
    ):
        assert_close(one, other, 1e-12)


def test_equal_clients_may_come_as_a_block():
    setting = Setting(CASES[3])
    x = setting.x.detach().view(2, 32, -1).requires_grad_()
    y = multi_lora(x, setting.weight, setting.bias, setting.a, setting.b, setting.scale)
    assert_close(y.flatten(0, 1), setting.alone(), 1e-12)
    (dx,) = torch.autograd.grad(y, x, setting.g.view(y.shape))
    assert_close(dx.flatten(0, 1), setting.results(setting.alone())[1], 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("unused", [None, 1])
def test_linears_of_one_input_together(impl, case, rate, unused, monkeypatch):
    """Of other ranks and widths; also if nothing is made of one of them."""
    clients, scales = len(case.sizes), (1.5, 0.5, 2.0)
    x = normal(case.rows, case.inp, seed=0, dtype=torch.float32).requires_grad_()
    weights = [normal(case.out + i, case.inp, seed=1 + i, dtype=torch.float32) for i in range(3)]
    ranks = [case.rank, case.rank + 2, 1]
    a_s = [normal(clients, r, case.inp, seed=5 + r, dtype=torch.float32) for r in ranks]
    b_s = [
        normal(clients, len(w), r, seed=9 + r, dtype=torch.float32)
        for w, r in zip(weights, ranks, strict=True)
    ]
    inputs = [t.requires_grad_() for t in (x, *a_s, *b_s)]
    dropout = case.dropout(rate)
    found = multi_loras(x, weights, [None] * 3, a_s, b_s, scales, case.sizes, dropout)
    monkeypatch.setenv("FEDLORA_OPS", "torch")
    alone = [
        multi_lora(x, w, None, a, b, scale, case.sizes, dropout)
        for w, a, b, scale in zip(weights, a_s, b_s, scales, strict=True)
    ]
    for one, other in zip(found, alone, strict=True):
        assert_close(one, other, 1e-5)
    used = [i for i in range(3) if i != unused]
    grads = [
        torch.autograd.grad(
            [ys[i] for i in used],
            inputs,
            [normal(*ys[i].shape, seed=20 + i, dtype=torch.float32) for i in used],
            allow_unused=True,
            materialize_grads=True,
        )
        for ys in (found, alone)
    ]
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("batch", [(0, 1), (1, 2), (0, 2), (2, 1, 0)])
def test_a_clients_mask_does_not_depend_on_the_others(batch):
    setting = Setting(CASES[1])
    case = setting.case
    parts, keys, whole = setting.x.split(case.sizes), case.keys(), setting.run(0.3)
    chosen = list(batch)
    y = multi_lora(
        torch.cat([parts[i] for i in chosen]),
        setting.weight,
        setting.bias,
        setting.a[chosen],
        setting.b[chosen],
        setting.scale,
        [case.sizes[i] for i in chosen],
        replace(setting.dropout(0.3), key=keys[chosen]),
    )
    assert_close(y, torch.cat([whole.split(case.sizes)[i] for i in chosen]), 1e-14)


def trained(together):
    """Factors after five steps of AdamW, which has no step in common over the clients."""
    setting = Setting(CASES[0])
    target = normal(setting.case.rows, setting.case.out, seed=9)
    optimiser = torch.optim.AdamW([setting.a, setting.b], lr=0.1)
    for _ in range(5):
        y = setting.run(0.3) if together else setting.alone(0.3)
        optimiser.zero_grad()
        (y - target).square().sum().backward()
        optimiser.step()
    return setting.a, setting.b


def test_five_steps_of_training_are_those_of_each_client():
    start = Setting(CASES[0])
    for one, other, before in zip(trained(True), trained(False), (start.a, start.b), strict=True):
        assert_close(one, other, 1e-12)
        assert float((one - before).abs().max()) > 0.1


def test_gradcheck():
    setting = Setting(CASES[1])

    def run(x, a, b):
        return multi_lora(
            x,
            setting.weight,
            setting.bias,
            a,
            b,
            setting.scale,
            setting.case.sizes,
            setting.dropout(0.3),
        )

    assert torch.autograd.gradcheck(run, setting.inputs)


@pytest.mark.parametrize("frozen", ["x", "a", "b"])
def test_what_is_frozen_has_no_gradient_and_keeps_nothing(impl, frozen):
    setting = Setting(CASES[0], torch.float32)
    _, *grads = setting.results(setting.run())
    getattr(setting, frozen).requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = setting.run()
    trained = [t for t in setting.inputs if t.requires_grad]
    found = torch.autograd.grad(y, trained, setting.g)
    wanted = [g for t, g in zip(setting.inputs, grads, strict=True) if t.requires_grad]
    for grad, expected in zip(found, wanted, strict=True):
        assert_close(grad, expected, 1e-6)
    shapes = [tuple(t.shape) for t in kept]
    assert ((setting.case.rows, setting.case.inp) in shapes) == (frozen != "a")
    assert ((setting.case.rows, setting.case.rank) in shapes) == (frozen != "b")


def test_checkpointing_changes_no_bit():
    setting = Setting(CASES[0])
    again = checkpoint(setting.run, 0.3, use_reentrant=False)
    for one, other in zip(setting.results(again), setting.results(setting.run(0.3)), strict=True):
        assert torch.equal(one, other)


def test_compiles_without_a_break():
    setting = Setting(CASES[0])
    torch._dynamo.reset()
    compiled = torch.compile(setting.run, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        setting.results(compiled(0.3)), setting.results(setting.run(0.3)), strict=True
    ):
        assert_close(one, other, 1e-14)


def test_autocast():
    setting = Setting(CASES[0], torch.float32)
    with torch.autocast(setting.x.device.type, torch.bfloat16):
        y = setting.run()
    assert y.dtype == torch.bfloat16
    for one, other in zip(setting.results(y), setting.results(setting.alone()), strict=True):
        assert_close(one, other, 1.2e-2)


def test_sizes_must_add_up():
    setting = Setting(CASES[0])
    x = setting.x[:-1]
    with pytest.raises(AssertionError, match=r"107 rows for sizes"):
        multi_lora(
            x,
            setting.weight,
            None,
            setting.a,
            setting.b,
            setting.scale,
            setting.case.sizes,
        )
