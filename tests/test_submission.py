"""AlgoPerf's functions as we write them: schedule, loss under several processes, errors."""

import collections
import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from algoperf_shampoo import submission
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.optim import EShampoo

ROOT = Path(__file__).parents[1]


def test_schedule_is_the_submissions_until_it_ends():
    """Against torch's own LinearLR and CosineAnnealingLR, composed as the 2024 submission does."""
    total, warmup = 90.4, 4
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    rise = LinearLR(optimizer, start_factor=1e-10, end_factor=1.0, total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, T_max=total - warmup)
    schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    for step in range(90):
        expected = optimizer.param_groups[0]["lr"]
        assert submission.warmup_cosine(step, warmup, total) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        schedule.step()
    assert submission.warmup_cosine(91, warmup, total) == pytest.approx(0.0, abs=1e-12)
    assert submission.warmup_cosine(500, warmup, total) == pytest.approx(0.0, abs=1e-12)


def test_monitor_means_and_round_trip():
    monitor = submission.Monitor()
    assert monitor.flush() == {}
    for value in (1.0, 2.0, 6.0):
        monitor.add(torch.tensor(value))
    twin = submission.Monitor()
    twin.load_state_dict(monitor.state_dict())
    assert monitor.flush() == twin.flush() == {"loss": 3.0}
    assert monitor.flush() == {}


def test_a_missing_hyperparameter_is_named():
    own = submission.Submission(lambda *_: None, ("common",))
    point = collections.namedtuple("Hyperparameters", "learning_rate epsilon")(1e-3, 1e-8)
    with pytest.raises(ValueError, match="one_minus_beta1 is missing"):
        own.init_optimizer_state(None, torch.nn.Linear(1, 1), None, point, None)
    with pytest.raises(ValueError, match="no search-space point given"):
        own.point(None)


def test_a_point_built_in_is_the_only_one():
    point = {"learning_rate": 0.1, "epsilon": 1e-8, "weight_decay": 0, "use_nadam": True}
    point |= {"one_minus_beta1": 0.1, "one_minus_beta2": 0.1, "warmup_factor": 0.1}
    point |= {"step_hint_factor": 1, "label_smoothing": 0, "dropout_rate": 0}
    own = submission.Submission(lambda *_: None, ("common",), built_in=point)
    assert own.point(None)._asdict().items() >= point.items()
    assert own.point(None) is own.point(None)
    with pytest.raises(ValueError, match="has its point built in and takes no other"):
        own.point(collections.namedtuple("Hyperparameters", point)(**point))
    own.built_in = {**point, "epsilon": 0}
    own._last = (None, None)
    with pytest.raises(ValueError, match="epsilon is 0"):
        own.init_optimizer_state(None, torch.nn.Linear(1, 1), None, None, None)


@pytest.mark.parametrize("skip, save, wanted", [
    (False, True, "on"), (False, False, "on"), (True, False, "on"), (True, True, "off"),
])  # fmt: skip
def test_nothing_is_shared_where_a_checkpoint_comes_without_an_evaluation(
    monkeypatch, skip, save, wanted
):
    flags = SimpleNamespace(is_parsed=lambda: True, skip_evals=skip, save_checkpoints=save)
    monkeypatch.setitem(sys.modules, "absl.flags", SimpleNamespace(FLAGS=flags))
    variant = submission_loader.import_module(ROOT, "eshampoo_fixed")
    own = variant.init_optimizer_state.__self__
    given = json.loads((ROOT / "search_spaces/mini/eshampoo_fixed.json").read_text())[0]
    monkeypatch.setattr(own, "built_in", {**given, "sharding": "on"})
    monkeypatch.setattr(own, "_last", (None, None))
    workload = SimpleNamespace(step_hint=10)
    state = own.init_optimizer_state(workload, torch.nn.Linear(2, 2), None, None, None)
    assert state["optimizer"].sharding == wanted


def test_an_unknown_workload_is_a_value_error():
    """AlgoPerf asks again with the base workload's name when it gets one."""
    assert submission.Submission.get_batch_size("ogbg") == 512
    with pytest.raises(ValueError, match="ogbg_gelu"):
        submission.Submission.get_batch_size("ogbg_gelu")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def replica(rank, port, directory):
    """Two steps of a bare module under two processes: wrapped again, equal afterwards."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)  # replicas start apart; wrapping takes rank 0's
    model = torch.nn.Linear(6, 4, bias=False)
    wrapped = submission._ensure_ddp(model)
    assert submission._ensure_ddp(wrapped) is wrapped
    optimizer = EShampoo(
        list(wrapped.parameters()),
        precondition_frequency=2,
        tau=0.1,
        max_preconditioner_dim=8,
        process_group=submission._process_group(),
    )
    data = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))
    weights = [torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])]
    gradient = None
    for _ in range(4):
        optimizer.zero_grad()
        per_example = wrapped(data[rank]).square().sum(-1) * weights[rank]
        loss = submission._global_mean(per_example.sum(), weights[rank].sum())
        loss.backward()
        gradient = model.weight.grad.clone() if gradient is None else gradient
        optimizer.step()
    torch.save((model.weight.detach(), gradient), f"{directory}/{rank}")
    dist.destroy_process_group()


def test_two_processes_take_the_gradient_of_the_global_batch(tmp_path):
    """Also with unequal numbers of valid examples, which is OGBG's case."""
    mp.spawn(replica, args=(free_port(), str(tmp_path)), nprocs=2)
    (first, gradient), (second, other) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert torch.equal(first, second)
    assert torch.equal(gradient, other)
    torch.manual_seed(0)
    alone = torch.nn.Linear(6, 4, bias=False)
    data = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))
    valid = torch.cat([data[0][:4], data[1][:1]])
    (alone(valid).square().sum(-1).sum() / 5).backward()
    torch.testing.assert_close(gradient, alone.weight.grad, rtol=1e-5, atol=1e-7)
