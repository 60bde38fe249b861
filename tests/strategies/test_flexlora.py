"""FlexLoRA against the SVD of the dense mean; Bai et al. 2402.11505, section 3.2."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapters import METHODS
from fedlora.errors import ConfigError
from fedlora.strategies.flexlora import FlexLora
from tests.server.cases import make_spec, randn
from tests.strategies.rounds import check, make
from tests.strategies.stacked import clients, far, from_start, given_to, mean_of, own, step

RANKS = ((4, 4, 4), (1, 2, 4), (1, 1, 2))


def best(dense, rank):
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], s


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_receives_the_best_approximation_of_the_mean(ranks, method):
    """|T - s B A|^2 = sum of sigma_j^2 beyond the client's rank, and no other matrix of that
    rank comes as near.
    """
    chosen, state, _ = make("flexlora", method, rank=4)
    updates = clients(chosen, state, ranks)
    ideal = mean_of(updates)
    state = step(chosen, state, updates)
    for rank in (1, 2, 4):
        _, sent = given_to(chosen, state, rank)
        for layer, dense in ideal.items():
            truncated, sigma = best(dense, rank)
            gap = float((dense - sent[layer]).norm() ** 2)
            torch.testing.assert_close(sent[layer], truncated, rtol=1e-5, atol=1e-5)
            assert abs(gap - float((sigma[rank:] ** 2).sum())) < 1e-5 * float(dense.norm() ** 2)
            for seed in range(5):
                # the competitor: any rows, and the best columns for them
                rows = randn(rank, dense.shape[1], seed=seed, dtype=torch.float64)
                other = dense @ torch.linalg.pinv(rows) @ rows
                assert float((dense - other).norm() ** 2) > gap


def test_a_smaller_message_is_the_leading_part_of_a_larger_one():
    chosen, state, _ = make("flexlora", rank=4)
    state = step(chosen, state, clients(chosen, state, (1, 2, 4)))
    whole, _ = given_to(chosen, state, 4)
    part, _ = given_to(chosen, state, 2)
    for layer in state.spec.layers:
        assert torch.equal(part[f"{layer.name}.A"], whole[f"{layer.name}.A"][:2])
        assert torch.equal(part[f"{layer.name}.B"], whole[f"{layer.name}.B"][:, :2])


def test_it_is_exact_when_the_ranks_of_all_clients_fit_in_the_global_one():
    chosen, state, _ = make("flexlora", rank=4)
    updates = clients(chosen, state, (1, 1, 2))
    assert far(own(step(chosen, state, updates)), mean_of(updates)) < 1e-6
    # but not when they do not
    updates = clients(chosen, state, (4, 4, 4))
    assert far(own(step(chosen, state, updates)), mean_of(updates)) > 1e-3


@pytest.mark.parametrize("split", ["left", "balanced"])
def test_the_split_says_which_factor_holds_the_singular_values(split):
    usual, state, _ = make("flexlora")
    updates = clients(usual, state)
    new = step(FlexLora(METHODS["lora"], {"svd_split": split}), state, updates)
    plain = own(step(usual, state, updates))
    assert far(own(new), plain) < 1e-6
    for layer in state.spec.layers:
        b, a = (new.tensors[f"{layer.name}.{f}"].double() for f in "BA")
        left, right = b.T @ b, a @ a.T
        if split == "left":
            torch.testing.assert_close(right, torch.eye(2).double(), rtol=0, atol=1e-6)
            assert bool((left.diagonal()[:-1] >= left.diagonal()[1:]).all())
        else:
            # sqrt(S / s) each, before B is divided by the common scale
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_another_split_is_refused():
    with pytest.raises(ConfigError, match=r"svd_split = 'right'; expected 'left' or 'balanced'"):
        FlexLora(METHODS["lora"], {"svd_split": "right"})


def test_a_mean_change_of_zero_keeps_the_rows():
    chosen, state, _ = make("flexlora")
    state = from_start(state)
    updates = clients(chosen, state, size=0.0)
    new = step(chosen, state, updates)
    for layer in state.spec.layers:
        assert torch.equal(new.tensors[f"{layer.name}.A"], state.tensors[f"{layer.name}.A"])
        assert not new.tensors[f"{layer.name}.B"].any()
    assert chosen.reduce(state, updates).notes["energy_beyond_smallest_rank"] == 0.0


def test_slots_beyond_the_rank_of_the_mean_can_still_learn():
    """One client of rank 1 in a federation of rank 4: three slots get new rows, B = 0."""
    chosen, state, _ = make("flexlora", rank=4)
    updates = [clients(chosen, state, (1, 1, 1))[0]]
    new = step(chosen, state, updates)
    assert far(own(new), mean_of(updates)) < 1e-6
    for layer in state.spec.layers:
        b, a = (new.tensors[f"{layer.name}.{f}"].double() for f in "BA")
        assert not b[:, 1:].any()
        assert bool((a.norm(dim=1) > 0.1).all())
        cosines = a @ a.T / a.norm(dim=1).outer(a.norm(dim=1))
        torch.testing.assert_close(cosines, torch.eye(4).double(), rtol=0, atol=1e-6)
    # other rows in another round
    later = step(chosen, replace(state, round=7), updates)
    assert not torch.equal(later.tensors["p.A"], new.tensors["p.A"])


def test_the_record_shows_the_energy_beyond_the_smallest_rank():
    chosen, state, _ = make("flexlora", rank=4)
    for ranks, smallest in (((1, 2, 4), 1), ((2, 2, 4), 2)):
        updates = clients(chosen, state, ranks)
        sigmas = [torch.linalg.svdvals(dense) for dense in mean_of(updates).values()]
        total = sum(float((s**2).sum()) for s in sigmas)
        notes = chosen.reduce(state, updates).notes
        for key, rank in (("energy_beyond_smallest_rank", smallest), ("energy_dropped", 4)):
            beyond = sum(float((s[rank:] ** 2).sum()) for s in sigmas) / total
            assert abs(notes[key] - beyond) < 1e-12
        assert notes["energy_beyond_smallest_rank"] > 0.01


def test_what_it_cannot_merge_is_refused():
    chosen = FlexLora(METHODS["lora"])
    check(chosen, make_spec(), [2, 1, 2], asynchronous=True)
    with pytest.raises(ConfigError, match="old moments mean nothing"):
        check(chosen, make_spec(), [2], optimizer_state="keep")
    with pytest.raises(ConfigError, match="needs a weight change that is s B A and nothing else"):
        check(FlexLora(METHODS["pissa"]), make_spec("pissa"), [2])
