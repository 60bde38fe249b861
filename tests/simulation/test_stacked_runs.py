"""Whole runs of the strategies that work on the mean weight change: resumes, error, bytes."""

import pytest

from fedlora.adapter import trained_shapes, with_rank
from fedlora.server.admission import expected_size
from fedlora.wire import decode_broadcast
from tests.simulation.runs import Run

CASES = {
    "flexlora": {"strategy": "flexlora"},
    "balanced": {"strategy": "flexlora", "strategy_options": {"svd_split": "balanced"}},
    "flora": {"strategy": "flora"},
    "fedex-lora": {"strategy": "fedex-lora"},
    "lora-fair": {"strategy": "lora-fair"},
    "cosine": {"strategy": "lora-fair", "strategy_options": {"solver": "cosine"}},
    "fedsvd": {"strategy": "fedsvd"},
}
EXACT = ("flora", "fedex-lora", "fedsvd")


@pytest.fixture
def make(make_job, tmp_path):
    def make_run(name="run", **sections):
        return Run(make_job(**sections), tmp_path / name)

    return make_run


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_pieces_equals_a_run_in_one_bit_for_bit(make, case):
    sections = {"federation": {**CASES[case], "rounds": 4}}
    whole, pieces = make("whole", **sections), make("pieces", **sections)
    whole.go()
    for until in (1, 3, 4):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert len(set(whole.adapters())) == 4
    assert whole.file(4) == pieces.file(4)


@pytest.mark.parametrize("case", CASES)
def test_the_aggregation_error_is_as_claimed(make, case):
    run = make(federation={**CASES[case], "rounds": 4}, training={"learning_rate": 0.1})
    run.go()
    errors = [event["aggregation_error"] for event in run.of("round")]
    if case in EXACT:
        assert max(errors) < 1e-5
    else:
        assert 1e-5 < max(errors) < 1


@pytest.mark.parametrize("case", [case for case in CASES if case != "fedsvd"])
def test_clients_of_unequal_rank_take_part_and_leave(make, case):
    """Ranks 2 and 1, two of four clients in each round."""
    sections = {
        "scenario": {"ranks": [2, 1]},
        "partition": {"clients": 4},
        "federation": {**CASES[case], "rounds": 5, "clients_per_round": 2},
    }
    whole, pieces = make("whole", **sections), make("pieces", **sections)
    whole.go()
    for until in (2, 5):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    if case in EXACT:
        assert max(event["aggregation_error"] for event in whole.of("round")) < 1e-5


def payload(run, factors, rank=2):
    """Bytes of one client's update with these factors: header + 4 sum r (d + k) + heads."""
    federation = run.federation
    return expected_size(
        trained_shapes(with_rank(federation.spec, rank), federation.method, factors)
    )


def part_sizes(run, task):
    """part -> bytes, from the names and shapes that the broadcast gives."""
    broadcast = decode_broadcast(task.manifest)
    federation = run.federation
    spec = with_rank(federation.spec, broadcast.plan.rank)
    shapes = trained_shapes(spec, federation.method)
    sizes = {}
    for part in broadcast.parts:
        if part == "heads":
            own = {k: v for k, v in shapes.items() if k in spec.head_shapes}
        elif part.startswith("factor."):
            own = {k: v for k, v in shapes.items() if k.endswith(part.removeprefix("factor"))}
        else:
            own = {}
            for layer, rank in zip(spec.layers, broadcast.fold_ranks[part], strict=True):
                own[f"{layer.name}.L"] = (layer.out, rank)
                own[f"{layer.name}.Q"] = (rank, layer.inp)
        sizes[part] = expected_size(own)
    return broadcast.parts, sizes


@pytest.mark.parametrize(
    ("case", "up", "steady"),
    [
        ("flexlora", "AB", {"factor.A", "factor.B", "heads"}),
        ("lora-fair", "AB", {"factor.A", "factor.B", "heads"}),
        ("fedsvd", "B", {"factor.A", "factor.B", "heads"}),
        ("fedex-lora", "AB", {"factor.A", "factor.B", "heads", "new fold"}),
        ("flora", "AB", {"heads", "new fold"}),
    ],
)
def test_bytes_are_those_of_the_paper(make, case, up, steady):
    """Up r (d + k), or r d; down r (d + k) and the fold of the round, rho (d + k), once.

    FLoRA sends no factor at all, for its clients draw the fresh ones themselves, also in the
    first round.
    """
    run = make(federation={**CASES[case], "rounds": 5})
    run.go()
    held = {}
    for tasks, replies, event in zip(run.tap.tasks, run.tap.replies, run.of("round"), strict=True):
        down = sum(len(task.manifest) for task in tasks)
        for task in tasks:
            parts, sizes = part_sizes(run, task)
            before = held.get(task.client, set())
            new = {p for p, digest in parts.items() if digest not in before}
            if case == "flora":
                new -= {"factor.A", "factor.B"}
            held[task.client] = before | set(parts.values())
            down += sum(sizes[p] for p in new)
            names = {"new fold" if p.startswith("fold.") else p for p in new}
            first = steady - {"new fold"}
            assert names == (steady if event["round"] > 1 else first | (names & {"factor.A"}))
            assert sum(p.startswith("fold.") for p in new) <= 1
        assert event["bytes_down"] == down
        assert all(len(reply.payload) == payload(run, up) for reply in replies)


def test_an_absent_client_of_flora_fetches_the_folds_it_missed(make):
    """One of three clients in turn, in six rounds; each version once per client."""
    run = make(federation={**CASES["flora"], "clients_per_round": 1, "rounds": 6})
    run.go()
    held, most = {}, 0
    for tasks, replies in zip(run.tap.tasks, run.tap.replies, strict=True):
        (task,), (reply,) = tasks, replies
        parts, sizes = part_sizes(run, task)
        before = held.get(task.client, set())
        wanted = {p for p, digest in parts.items() if digest not in before and "factor" not in p}
        held[task.client] = set(parts.values())
        most = max(most, sum(p.startswith("fold.") for p in wanted))
        assert reply.bytes_down == len(task.manifest) + sum(sizes[p] for p in wanted)
    assert most > 1
    assert max(event["aggregation_error"] for event in run.of("round")) < 1e-5


def test_the_fresh_factors_of_flora_are_drawn_and_not_fetched(make):
    """From the first round on, whose seed is that of the initial adapter."""
    run = make(federation={**CASES["flora"], "rounds": 2})
    run.go()
    plans = [decode_broadcast(tasks[0].manifest).plan for tasks in run.tap.tasks]
    assert plans[0].fresh == run.federation.spec.seed
    assert len({plan.fresh for plan in plans}) == 2
    (task, *_), (reply, *_) = run.tap.tasks[0], run.tap.replies[0]
    _, sizes = part_sizes(run, task)
    assert reply.bytes_down == len(task.manifest) + sizes["heads"]


def test_the_record_shows_rank_collapse_and_the_residual(make):
    for case, keys in (
        ("flexlora", {"energy_beyond_smallest_rank", "energy_dropped"}),
        ("fedex-lora", {"residual_norm", "residual_rank"}),
    ):
        run = make(case, federation=CASES[case])
        run.go()
        assert all(event["notes"].keys() == keys for event in run.of("round"))
        assert [line["notes"] for line in run.lines() if line["event"] == "round"] == [
            event["notes"] for event in run.of("round")
        ]
