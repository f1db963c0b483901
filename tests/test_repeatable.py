"""A run of several processes that is resumed continues to the bit where torch's kernels repeat."""

from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from algoperf_shampoo import repeatable
from algoperf_shampoo.harness import hparams, prng, submission_loader
from algoperf_shampoo.workloads import load

from .optim.ranks import Ranks

ROOT = Path(__file__).parents[1]
VARIANT = "eshampoo_fixed"


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(3, timeout=30)
    yield ranks
    ranks.close()


class Training:
    """ViT's mini under DDP, its parameters those of ``start`` if that is given."""

    def __init__(self, group, start=None):
        self.group, self.workload = group, load("imagenet_vit_mini")
        self.submission = submission_loader.load(ROOT, VARIANT)
        fields = submission_loader.fields(ROOT, VARIANT)
        space = ROOT / "search_spaces" / "mini" / f"{VARIANT}.json"
        (point,) = hparams.read_points(space, 1, fields, self.workload.name)
        self.point = hparams.as_namedtuple({**point, hparams.F_KEY: 3})
        self.rng = prng.PRNGKey(1)
        model, _ = self.workload.init_model_fn(self.rng)
        self.model = DistributedDataParallel(model, process_group=group)
        self.state = self.submission.init_optimizer_state(
            self.workload, self.model, None, self.point, self.rng
        )
        if start is not None:
            self.model.load_state_dict(start["model"])
            for name, value in start["state"].items():
                self.state[name].load_state_dict(value)

    def steps(self, first, last):
        for step in range(first, last):
            key = prng.fold_in(self.rng, 8 * step + self.group.rank())
            batch = self.workload.synthetic_batch(8, key)
            self.submission.update_params(
                self.workload, self.model, None, None, self.point, batch,
                self.workload.loss_type, self.state, [], step, self.rng,
            )  # fmt: skip
        return [p.detach().clone() for p in self.model.parameters()]

    def saved(self):
        """As on rank 0 in a checkpoint, and given to all."""
        self.state["optimizer"].gather_state()
        return {
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "state": {name: value.state_dict() for name, value in self.state.items()},
        }


def continued(group, settle):
    """Ends of an unbroken run, and of one that goes on from its fourth step in a new DDP."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    original = repeatable.buckets_matter
    try:
        if not settle:
            repeatable.buckets_matter = lambda model: False
        unbroken = Training(group)
        unbroken.steps(0, 4)
        saved = unbroken.saved()
        wanted = unbroken.steps(4, 7)
        found = Training(group, saved).steps(4, 7)
    finally:
        repeatable.buckets_matter = original
        torch.use_deterministic_algorithms(False)
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_three_ranks_continue_to_the_bit(ranks):
    assert ranks(3, continued, True) == [True] * 3
    # It is the first backward's buckets that would part them.
    assert ranks(3, continued, False) == [False] * 3


def test_a_backward_thrown_away_leaves_no_trace():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout())
    torch.manual_seed(3)
    x, before = torch.randn(5, 3), [b.clone() for b in model.buffers()]
    generator = torch.get_rng_state()
    ran = []

    def backward():
        ran.append(float(model(x).sum().backward() or 0))

    repeatable.throw_away(model, backward)
    assert len(ran) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value", ["yes", "2"])
def test_the_variable_is_checked(monkeypatch, value):
    monkeypatch.setenv(repeatable.VARIABLE, value)
    with pytest.raises(ValueError, match=f"{repeatable.VARIABLE}={value}: it must be 1, or empty"):
        repeatable.set_up()


def test_the_variable_asks_torch(monkeypatch):
    monkeypatch.setenv(repeatable.VARIABLE, "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # for monkeypatch to put back what was
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert not torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = True
        repeatable.set_up()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark
