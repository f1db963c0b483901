"""Ranks that share an optimizer's work give the numbers of one process."""

import pytest
import torch

from algoperf_shampoo.optim import EShampoo, Solver, sharding
from algoperf_shampoo.optim.blocks.factors import build_factor_sets
from algoperf_shampoo.optim.blocks.layout import Layout, Member
from algoperf_shampoo.optim.blocks.partition import cut

from . import sharded
from .ranks import Ranks
from .support import STARTS, VARIANTS

WITH_FACTORS = [v for v in VARIANTS if v != "nadamw"]


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4, timeout=20)
    yield ranks
    ranks.close()


def same(a, b):
    """Nested states are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def distance(found, wanted, start):
    """The largest difference of two ends over the movement, per parameter."""
    return max(
        float((a - b).detach().norm() / (b - s).detach().norm())
        for a, b, s in zip(found, wanted, start, strict=True)
    )


@pytest.mark.parametrize("trouble", ["", "missing", "bad", "groups"])
@pytest.mark.parametrize("variant", WITH_FACTORS)
def test_any_number_of_ranks_gives_what_one_process_gives(ranks, variant, trouble):
    """Products of stacks of other sizes may round otherwise: not to the bit."""
    if trouble and variant not in ("eshampoo_adaptive", "kl_shampoo"):
        pytest.skip("by one rule of either kind")
    alone = sharded.train(None, variant, 8, trouble)
    shapes = sharded.SQUARE if variant in STARTS else sharded.SHAPES
    start = sharded.parameters(torch.float64, shapes)
    for n in (1, 2, 3, 4) if variant == "eshampoo_adaptive" else (3,):
        results = ranks(n, sharded.train, variant, 8, trouble)
        found = results[0]
        assert distance(found["params"], alone["params"], start) < 1e-9
        for other in results:
            assert same(other["params"], found["params"])
            assert other["differ"] == (0, False)
            assert other["skipped"] == alone["skipped"]
        assert sum(r["blocks"] for r in results) == alone["blocks"]
        assert sum(r["factors"] for r in results) == alone["factors"]
        for number, entry in alone["state"]["state"].items():
            mine = found["state"]["state"][number]
            assert mine.keys() == entry.keys()
            for key, value in entry.items():
                if not isinstance(value, torch.Tensor):
                    assert mine[key] == value, key
                else:
                    torch.testing.assert_close(mine[key], value, rtol=1e-6, atol=1e-6)
        if n == 1:
            assert same(found["params"], alone["params"])
    if trouble == "bad":
        assert alone["skipped"]


def test_factors_are_shared_evenly(ranks):
    whole = sharded.train(None, "eshampoo_fixed", 1)
    for n in (2, 4):
        results = ranks(n, sharded.train, "eshampoo_fixed", 1)
        assert max(r["factors"] for r in results) < 1.1 * whole["factors"] / n


@pytest.mark.parametrize("variant", ["eshampoo_adaptive", "kl_shampoo"])
def test_resume_is_exact_and_on_another_number_of_ranks_has_the_same_state(ranks, variant):
    whole = ranks(2, sharded.train, variant, 9)[0]
    part = ranks(2, sharded.train, variant, 5)[0]
    again = ranks(2, sharded.resume, variant, part, 6, 4)
    assert all(same(r["params"], whole["params"]) for r in again)
    assert all(same(r["state"]["state"], whole["state"]["state"]) for r in again)
    for n in (1, 3):
        loaded = ranks(n, sharded.resume, variant, part, 6, 0)
        assert all(same(r["state"]["state"], part["state"]["state"]) for r in loaded)


def test_one_step_from_the_same_state_and_gradients_is_the_same_on_any_number_of_ranks(ranks):
    part = ranks(2, sharded.train, "eshampoo_fixed", 5)[0]
    one, *others = [ranks(n, sharded.resume, "eshampoo_fixed", part, 6, 1)[0] for n in (1, 2, 3, 4)]
    start = part["params"]
    assert all(distance(x["params"], one["params"], start) < 1e-12 for x in others)


def test_state_is_refused_until_it_is_gathered(ranks):
    for rank, (every, devices) in enumerate(ranks(2, sharded.refusals)):
        fresh, at_zero, stepped, everywhere, last = every
        for said in (fresh, stepped, last, at_zero if rank else fresh):
            assert all("call gather_state() on every rank first" in text for text in said)
        assert everywhere[:2] == ["", ""] and "0.factor_0" in everywhere[2]
        assert at_zero == ["", ""] or rank
        assert devices == ["cpu", "meta"]


@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_continues_to_the_bit(ranks, tmp_path, flatten):
    for saved, unbroken in ranks(2, sharded.checkpointed, str(tmp_path / "dcp"), flatten):
        assert same(saved, unbroken)


@pytest.mark.parametrize("where", ["gradient", "two entries", "parameter"])
def test_replicas_that_part_are_noticed(ranks, where):
    wanted = [(0, True), (0, True)] if where == "parameter" else [(1, False), (0, False)]
    for found in ranks(3, sharded.unequal, where):
        assert found == wanted


def test_a_state_loaded_after_a_step_that_failed_on_one_rank(ranks):
    saved = ranks(1, sharded.train, "kl_shampoo", 4)[0]["state"]
    assert ranks(2, sharded.loaded_after_a_failure, saved) == [(0, False)] * 2


def test_a_state_that_some_ranks_have_not_loaded_is_noticed(ranks):
    saved = ranks(1, sharded.train, "eshampoo_fixed", 3, "", torch.float32)[0]["state"]
    assert ranks(3, sharded.loaded_by_one, saved) == [(0, True)] * 3


@pytest.mark.parametrize("variant", ["eshampoo_adaptive", "kl_shampoo"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_gradient_that_one_rank_lacks_is_noticed(ranks, variant, at):
    for unequal, parted in ranks(3, sharded.lacking, variant, at):
        assert unequal >= 1 or parted


@pytest.mark.parametrize("sharding_", ["on", "off"])
def test_what_a_refresh_leaves_beside_gradients_is_not_compared(ranks, sharding_):
    assert ranks(2, sharded.worked_in, sharding_) == [(0, False)] * 2


@pytest.mark.parametrize("variant", ["eshampoo_adaptive", "kl_shampoo"])
def test_groups_of_no_parameters_and_blocks_without_factors(ranks, variant):
    moved, counts = sharded.odd_shapes(None, variant)
    assert all(x > 0 for x in moved) and all(entry["step"] >= 6 for entry in counts)
    for n in (2, 4):
        for mine, counted in ranks(n, sharded.odd_shapes, variant):
            assert mine == pytest.approx(moved, rel=0.5)
            assert counted == counts


def test_all_ranks_stop_for_bad_gradients_at_the_same_step(ranks):
    for said in ranks(2, sharded.always_bad):
        assert "in so many steps in a row: parameter 0 2 (of 2 in all)" in said


def test_measurements_count_all_factors_whether_a_checkpoint_follows_or_not(ranks):
    alone = sharded.measured(None, True)
    assert alone["eigenbasis_refreshes"] > 0
    for checkpoint in (True, False):
        for found in ranks(2, sharded.measured, checkpoint):
            assert {k: found[k] for k in alone} == alone


def test_a_state_that_overflows_starts_anew_on_all_ranks(ranks):
    saved = ranks(1, sharded.train, "eshampoo_fixed", 4, "", torch.float32)[0]["state"]
    for steps in ranks(3, sharded.overflowing, saved):
        assert steps == [0, *[4] * (len(steps) - 1)]


def test_a_process_outside_its_group_and_a_rank_that_is_not_there_are_refused(ranks):
    for rank, (outside, nobody) in enumerate(ranks(4, sharded.outside)):
        assert outside == ("process_group: this process is not one of it" if rank else "")
        assert nobody == "to must be a rank of the process group, at most 3: 4"


def test_pieces_of_parameters_are_refused_with_what_to_do(ranks):
    for said in ranks(2, sharded.fsdp):
        assert len(said) == 3
        for text in said:
            assert text.startswith("parameter 0 is sharded (by FSDP, or a DTensor)")
            assert text.endswith("give process_group, whose ranks share the optimizer's state")


def test_telemetry_goes_on_where_the_rank_that_saves_it_has_checked_nothing(ranks):
    (alone, _), *_ = ranks(1, sharded.watched)
    (found, checks), *_ = ranks(3, sharded.watched)
    assert checks == 0
    assert found[0] == found[1] == alone[0]


def test_a_pickle_of_before_ranks_shared_the_work_loads():
    optimizer = EShampoo([torch.nn.Parameter(torch.ones(3, 3))])
    state = optimizer.__getstate__()
    del state["sharding"]
    again = EShampoo.__new__(EShampoo)
    again.__setstate__(state)
    assert again.sharding == "off" and same(again.state_dict(), optimizer.state_dict())


def test_a_rank_whose_step_failed_steps_again_and_the_others_wait(ranks):
    for failed, unbroken in ranks(2, sharded.failing):
        assert same(failed, unbroken)


def test_without_a_group_or_with_one_rank_nothing_is_shared(ranks):
    (found,) = ranks(1, sharded.train, "eshampoo_fixed", 2)
    assert found["blocks"] == sharded.train(None, "eshampoo_fixed", 2)["blocks"]
    with pytest.raises(ValueError, match=r"sharding must be one of auto, on, off, got 'of'"):
        EShampoo([torch.nn.Parameter(torch.ones(3))], sharding="of")


def test_it_pays_by_shapes_alone():
    vit = [((384, 1024), True)] * 60
    assert sharding.pays(vit, 100, 2) and sharding.pays(vit, 1, 64)
    assert not sharding.pays([((64,), True)], 100, 2)
    assert not sharding.pays([((384, 1024), False)] * 60, 1, 8)


@pytest.mark.parametrize("n", [64, 1024, 8192])
def test_one_block_or_one_far_larger_than_all_others_does_not_pay(n):
    """Its owner has no less to do than it would have alone."""
    rest = [((n // 16, n // 16), True)] * 40
    for ranks_ in (2, 8, 64):
        assert not sharding.pays([((n, n), True)], 1, ranks_)
        assert not sharding.pays([((n, n), True), *rest], 100, 64)


@pytest.mark.parametrize("ranks_", [1, 2, 3, 8, 64])
def test_owners_are_balanced(ranks_):
    blocks = [b for shape in [(4096, 1024), (300, 70), (5000,), (64, 3)] for b in cut(shape, 512)]
    members = [Member(0, i, b) for i, b in enumerate(blocks)]
    found = sharding.owners(members, lambda shape: len(shape) > 1, ranks_)
    assert len(found) == len(members) and set(found) <= set(range(ranks_))
    costs = [0] * ranks_
    for owner, m in zip(found, members, strict=True):
        costs[owner] += sum(n**3 for n in m.block.shape) if len(m.block.shape) > 1 else 0
    dearest = max(sum(n**3 for n in b.shape) for b in blocks)
    assert max(costs) <= sum(costs) / ranks_ + dearest


def test_a_stalled_rank_ends_the_others_within_the_time_of_the_group():
    """Where updates are exchanged, and where gradients are compared."""
    ranks = Ranks(3, timeout=2)
    try:
        for n, frequency in ((2, 3), (3, 1)):
            said, *_ = ranks(n, sharded.stalled, frequency)
            assert "load_state_dict() with a saved state" in said[1]
    finally:
        ranks.close()


def test_a_refresh_has_half_of_the_room_that_sharing_saves():
    params = [torch.nn.Parameter(torch.empty(1024, 512)) for _ in range(4)]
    solver = Solver(workspace_mib=8)
    layouts = [
        Layout(params, lambda p: cut(tuple(p.shape), 1024), 0, owners, 0, ranks)
        for owners, ranks in ((None, 1), (lambda members: [0, 0, 1, 1], 2))
    ]
    for layout in layouts:
        build_factor_sets(layout.stacks)
        build_factor_sets(layout.others, elsewhere=True)
    elsewhere = 2 * 2 * (1024**2 + 512**2) * 4 >> 20  # MiB: two blocks, factors and bases
    mib = [sharding.roomier(solver, layout).workspace_mib for layout in layouts]
    assert mib == [8, 8 + elsewhere]
