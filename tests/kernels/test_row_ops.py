"""Products of groups of rows, by every way and by kernel, against float64 group by group."""

import pytest
import torch

from fedlora.errors import ConfigError
from fedlora.ops import row_groups, row_ops
from fedlora.ops.ds_db import ds_db, grouped_ds_db
from tests.kernels.close import assert_close
from tests.kernels.conftest import GPU
from tests.kernels.low_rank import CASES, masked, normal

# bfloat16 is stored without rounding by the interpreter
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3 if GPU else 8e-3}
WAYS = ("loop", "padded", "masked", row_ops.TRITON)
CPU_WAYS = [(way, kind) for way in WAYS for kind in (torch.float32, torch.bfloat16)]
CPU_WAYS.append((row_ops.TRITON, torch.float16))


@pytest.fixture(params=CPU_WAYS, ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def way_and_kind(request, monkeypatch):
    monkeypatch.setenv("FEDLORA_OPS", "triton" if GPU else "interpret")
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_products_are_those_of_each_group(way_and_kind, case, rate):
    way, kind = way_and_kind
    dropout = case.dropout(rate)
    x = normal(case.rows, case.inp, seed=1, dtype=kind, margin=3)
    y = normal(case.rows, case.inp, seed=2, dtype=kind, margin=5)
    a = normal(len(case.sizes), case.rank, case.inp, seed=3, dtype=kind)
    g = normal(case.rows, case.rank, seed=4, dtype=kind, margin=2)
    dropped = masked(x, case, dropout)
    s = torch.cat(
        [part @ f.double().T for part, f in zip(dropped.split(case.sizes), a, strict=True)]
    )
    bound = BOUNDS[kind]
    assert_close(row_ops.shrink(x, a, case.sizes, dropout, way), s, bound)
    assert_close(row_ops.shrink(x, a, case.sizes, dropout, way, 0.25), 0.25 * s, bound)

    grads = [
        left.double().T @ right
        for left, right in zip(g.split(case.sizes), dropped.split(case.sizes), strict=True)
    ]
    found = row_ops.factor_grads(g, x, case.sizes, dropout, way, 0.25)
    assert_close(found, 0.25 * torch.stack(grads), 1.5 * bound)
    for size, grad in zip(case.sizes, found, strict=True):
        assert size or not grad.any()

    change = torch.cat(
        [part.double() @ f.double() for part, f in zip(g.split(case.sizes), a, strict=True)]
    )
    expected = y.double() + 0.25 * masked(change, case, dropout)
    row_ops.expand_(y, g, a.mT, case.sizes, dropout, way, 0.25)
    assert_close(y, expected, bound)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_product_of_torch(kind):
    """Rank and widths are multiples of 8, as it demands."""
    case = CASES[3]
    sizes = (40, 0, 24)
    x = normal(64, case.inp, seed=1, dtype=kind)
    a = normal(3, case.rank, case.inp, seed=2, dtype=kind)
    if GPU and kind != torch.bfloat16:
        pytest.skip("bfloat16 only")
    s = row_groups.shrink(x, a, sizes, None, "grouped")
    assert_close(s, row_groups.shrink(x.double(), a.double(), sizes, None, "loop"), 8e-3)
    found = row_groups.factor_grads(s, x, sizes, None, "grouped")
    expected = row_groups.factor_grads(s.double(), x.double(), sizes, None, "loop")
    assert_close(found, expected, 8e-3)
    assert not found[1].any()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", list(BOUNDS), ids=str)
def test_ds_db_in_one_pass(impl, case, kind):
    dy = normal(case.rows, case.out, seed=1, dtype=kind, margin=3)
    b = normal(len(case.sizes), case.out, case.rank, seed=2, dtype=kind)
    s = normal(case.rows, case.rank, seed=3, dtype=kind, margin=4)
    ds = torch.empty(case.rows, 2 * case.rank, dtype=kind)[:, : case.rank]
    db = grouped_ds_db(dy, b, s, case.sizes, 0.5, ds)
    parts = list(zip(dy.double().split(case.sizes), s.double().split(case.sizes), strict=True))
    assert_close(db, 0.5 * torch.stack([g.T @ t for g, t in parts]), 1.5 * BOUNDS[kind])
    expected = [g @ f.double() for (g, _), f in zip(parts, b, strict=True)]
    assert_close(ds, 0.5 * torch.cat(expected), 1.5 * BOUNDS[kind])


def test_ds_db_makes_only_what_is_wanted(impl):
    dy, b, s = (normal(*shape, seed=i) for i, shape in enumerate([(7, 5), (5, 2), (7, 2)]))
    ds = torch.empty(7, 2, dtype=torch.float64)
    assert ds_db(dy, b, None, 2.0, ds) is None
    assert_close(ds, 2.0 * dy @ b, 1e-14)
    assert_close(ds_db(dy, b, s, 2.0, None), 2.0 * dy.T @ s, 1e-14)


@pytest.mark.parametrize(
    ("sizes", "kind", "rank", "way"),
    [
        ((4, 4, 4), torch.bfloat16, 16, "bmm"),
        ((5,), torch.float32, 3, "bmm"),
        ((4, 5), torch.bfloat16, 16, "grouped"),
        ((4, 5), torch.bfloat16, 4, "padded"),
        ((4, 5), torch.float32, 16, "padded"),
        ((1, 1, 50), torch.float32, 16, "loop"),
    ],
)
def test_what_is_chosen_on_a_gpu(sizes, kind, rank, way, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert row_groups.choose(rank, (64, 32), sizes, torch.device("cuda"), kind) == way


@pytest.mark.parametrize("way", ["loop", "padded", row_ops.TRITON])
def test_a_diverged_client_stays_alone(way, monkeypatch):
    """Zero times its infinity must not reach the others, by whatever is chosen by itself."""
    monkeypatch.setenv("FEDLORA_OPS", "triton" if GPU else "interpret")
    sizes = (3, 4)
    x, dy, a, b = (
        normal(*shape, seed=i, dtype=torch.float32)
        for i, shape in enumerate([(7, 6), (7, 5), (2, 2, 6), (2, 5, 2)])
    )
    x[3:], dy[3:], a[1], b[1] = float("nan"), float("inf"), float("nan"), float("inf")
    s = row_ops.shrink(x, a, sizes, None, way)
    y = torch.zeros(7, 5)
    row_ops.expand_(y, s, b, sizes, None, way)
    assert y[:3].isfinite().all()
    assert not y[3:].isfinite().any()
    assert row_ops.factor_grads(s, x, sizes, None, way)[0].isfinite().all()
    ds = torch.empty(7, 2)
    assert grouped_ds_db(dy, b, s, sizes, 1.0, ds)[0].isfinite().all()
    assert ds[:3].isfinite().all()


def _op_arguments(keys):
    x, s, a = normal(5, 6, seed=1), normal(5, 2, seed=2), normal(2, 2, 6, seed=3)
    tail = ([2, 3], keys, 0.25, 2, 5, "loop", 0.5)
    return {
        "row_shrink": (x, a, *tail),
        "row_expand_": (x.clone(), s, a.mT.contiguous(), *tail),
        "row_factor_grads": (s, x, *tail),
        "ds_db": (x, a.mT.contiguous(), s, [2, 3], 2.0, s.clone()),
        "rmsnorm_shrink": (x, torch.rand(6, dtype=torch.float64), a[0], 1e-5),
    }


@pytest.mark.parametrize(
    "name", ["row_shrink", "row_expand_", "row_factor_grads", "ds_db", "rmsnorm_shrink"]
)
@pytest.mark.parametrize("with_keys", [False, True])
def test_ops_are_sound(name, with_keys, monkeypatch):
    """Schema, fake tensors and tracing, as torch checks them."""
    import fedlora.ops.rmsnorm_shrink  # noqa: F401

    monkeypatch.setenv("FEDLORA_OPS", "torch")
    keys = torch.tensor([3, 4]) if with_keys else None
    torch.library.opcheck(getattr(torch.ops.fedlora, name).default, _op_arguments(keys)[name])


def test_interpreter_must_be_asked_for_in_time(monkeypatch):
    monkeypatch.setenv("FEDLORA_OPS", "interpret")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        row_ops.way_of(torch.zeros(1, 1), 1, (1,), (1,), masked=True)
