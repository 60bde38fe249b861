"""Each client's row against torch's own optimiser of that client."""

from dataclasses import replace

import pytest
import torch

from fedlora.ops import client_adamw as op
from fedlora.ops.client_adamw import AdamWBuffers, AdamWStep, client_adamw_
from tests.kernels.close import assert_close, seeded

STEPS = 5


def buffers(clients, size, dtype=torch.float32, narrow=None):
    values = torch.randn(clients, size, generator=seeded(1)).to(dtype)
    copy = None if narrow is None else values.to(narrow)
    return AdamWBuffers(values, torch.zeros_like(values), torch.zeros_like(values), copy)


def settings(clients, **changes):
    """Of clients that differ in everything."""
    spread = torch.arange(1.0, clients + 1.0)
    made = AdamWStep(
        rate=1e-2 * spread,
        step=torch.ones(clients, dtype=torch.int64),
        active=torch.ones(clients, dtype=torch.bool),
        weight_decay=0.1 * (spread - 1.0),
    )
    return replace(made, **changes)


def gradient(step, clients, size, dtype=torch.float32):
    # of very different lengths
    size_by_client = 10.0 ** (torch.arange(clients)[:, None] - 1.0)
    return (torch.randn(clients, size, generator=seeded(50 + step)) * size_by_client).to(dtype)


def one_by_one(start, given, steps=STEPS):
    """Rows after some steps of torch.optim.AdamW on each row alone, with one group per rate."""
    rows = []
    for k, row in enumerate(start):
        factors = torch.ones(len(row)) if given.multiplier is None else given.multiplier
        own = [torch.nn.Parameter(row[factors == f].clone()) for f in factors.unique()]
        groups = [
            {"params": [p], "lr": float(given.rate[k].double() * f)}
            for p, f in zip(own, factors.unique(), strict=True)
        ]
        optimizer = torch.optim.AdamW(
            groups,
            weight_decay=float(given.weight_decay[k]),
            betas=given.betas,
            eps=given.eps,
        )
        for step in range(steps):
            whole = gradient(step, len(start), len(row))[k].to(row.dtype)
            for p, f in zip(own, factors.unique(), strict=True):
                p.grad = whole[factors == f].clone()
            if given.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(own, float(given.max_norm[k]))
            optimizer.step()
        joined = torch.empty_like(row)
        for p, f in zip(own, factors.unique(), strict=True):
            joined[factors == f] = p.detach()
        rows.append(joined)
    return torch.stack(rows)


def trained(held, given, steps=STEPS):
    for step in range(steps):
        grads = gradient(step, *held.parameters.shape).to(held.parameters.dtype)
        client_adamw_(held, grads, replace(given, step=given.step + step))
    return held.parameters


@pytest.mark.parametrize(("clients", "size"), [(3, 1000), (1, 1), (2, 2049), (4, 7)])
@pytest.mark.parametrize("clipped", [False, True])
def test_every_row_is_its_clients_own_optimiser(impl, clients, size, clipped):
    bounds = torch.tensor([0.5, float("inf"), 3.0, 1e-3])[:clients] if clipped else None
    given = settings(clients, max_norm=bounds)
    held = buffers(clients, size)
    expected = one_by_one(held.parameters, given)
    assert_close(trained(held, given), expected, 1e-7)


def test_parameters_may_have_rates_of_their_own(impl):
    """As LoRA+ has; a rate of 0 leaves a parameter where it is."""
    factors = torch.tensor([1.0, 16.0, 0.0])[torch.arange(1000) % 3]
    given = settings(3, multiplier=factors, max_norm=torch.tensor([0.5, 1.0, 2.0]))
    held = buffers(3, 1000)
    start = held.parameters.clone()
    expected = one_by_one(start, given)
    found = trained(held, given)
    assert_close(found, expected, 1e-7)
    assert torch.equal(found[:, factors == 0], start[:, factors == 0])


def test_buffers_may_be_columns_of_wider_ones(impl):
    """Their neighbours keep every bit."""
    whole, given = buffers(3, 900, narrow=torch.bfloat16), settings(3)
    cut = AdamWBuffers(*(b[:, 100:800] for b in vars(whole).values()))
    before = [b.clone() for b in vars(whole).values()]
    own = AdamWBuffers(
        *(b.clone(memory_format=torch.contiguous_format) for b in vars(cut).values())
    )
    grads = gradient(0, 3, 900)
    client_adamw_(cut, grads[:, 100:800], given)
    client_adamw_(own, grads[:, 100:800].contiguous(), given)
    outside = torch.ones(900, dtype=torch.bool)
    outside[100:800] = False
    for old, new, mine in zip(before, vars(whole).values(), vars(own).values(), strict=True):
        assert torch.equal(new[:, 100:800], mine)
        assert torch.equal(new[:, outside], old[:, outside])


def test_float64(impl):
    given = settings(3, max_norm=torch.tensor([0.5, 1.0, 2.0]))
    held = buffers(3, 100, torch.float64)
    expected = one_by_one(held.parameters, given)
    assert_close(trained(held, given), expected, 1e-14)


def test_a_client_that_is_not_active_keeps_every_bit(impl):
    given = settings(3, active=torch.tensor([True, False, True]), max_norm=torch.ones(3))
    held = buffers(3, 1000, narrow=torch.bfloat16)
    trained(held, settings(3), 2)
    before = [b.clone() for b in vars(held).values()]
    grads = gradient(9, 3, 1000)
    grads[1] = float("nan")
    client_adamw_(held, grads, given)
    for old, new in zip(before, vars(held).values(), strict=True):
        assert torch.equal(old[1], new[1])
        assert bool((old != new)[0].any())
        assert bool((old != new)[2].any())
        assert bool(new.isfinite().all())


def test_clients_do_not_touch_each_other(impl):
    together, apart = buffers(3, 700), buffers(3, 700)
    trained(together, settings(3), 2)
    for step in range(2):
        for k in range(3):
            only = torch.arange(3) == k
            given = settings(3, active=only)
            client_adamw_(apart, gradient(step, 3, 700), replace(given, step=given.step + step))
    assert torch.equal(together.parameters, apart.parameters)


@pytest.mark.parametrize(("narrow", "bound"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_narrow_gradients_and_copy(impl, narrow, bound):
    """The moments and the parameters themselves stay in float32."""
    held, wide = buffers(3, 1000, narrow=narrow), buffers(3, 1000)
    grads = gradient(0, 3, 1000, narrow)
    client_adamw_(held, grads, settings(3))
    client_adamw_(wide, grads.float(), settings(3))
    assert torch.equal(held.parameters, wide.parameters)
    assert_close(held.narrow, held.parameters, bound)


def test_gradients_are_left_as_they_are(impl):
    held, grads = buffers(3, 100), gradient(0, 3, 100)
    before = grads.clone()
    client_adamw_(held, grads, settings(3, max_norm=torch.full((3,), 1e-3)))
    assert torch.equal(grads, before)


def test_nobody_and_nothing(impl):
    held = buffers(0, 5)
    client_adamw_(held, torch.empty(0, 5), settings(0))
    idle = buffers(2, 5)
    before = idle.parameters.clone()
    client_adamw_(idle, gradient(0, 2, 5), settings(2, active=torch.zeros(2, dtype=torch.bool)))
    assert torch.equal(idle.parameters, before)


def arguments(held, **changes):
    given = settings(3, multiplier=torch.ones(20), **changes)
    grads = gradient(0, 3, 20)
    by_client = op._by_client(grads, given, torch.float32)
    tail = (grads, by_client, given.active, given.multiplier, *given.betas, given.eps)
    return (held.parameters, held.first, held.second, held.narrow, *tail)


@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
def test_registration(narrow):
    torch.library.opcheck(op._step, arguments(buffers(3, 20, narrow=narrow)))


def test_compiles_without_a_break():
    def step(parameters, first, second, grads, given):
        client_adamw_(AdamWBuffers(parameters, first, second), grads, given)
        return parameters * 2.0

    held, other = buffers(3, 20), buffers(3, 20)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given, grads = settings(3), gradient(0, 3, 20)
    found = compiled(held.parameters, held.first, held.second, grads, given)
    expected = step(other.parameters, other.first, other.second, grads, given)
    assert torch.equal(found, expected)
    assert torch.equal(held.second, other.second)
