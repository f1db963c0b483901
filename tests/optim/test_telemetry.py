"""Telemetry of factors: what its rows say is so, and nothing else changes."""

import copy
import csv
import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from algoperf_shampoo.optim import EShampoo, reference
from algoperf_shampoo.optim.eigen import exact
from algoperf_shampoo.optim.telemetry import COLUMNS, KINDS, Telemetry, condition, describe

from .support import PRECONDITIONED, blocks_of, gradients, late, make

SHAPES = [(12, 7), (9,), (5, 6, 7), (20, 3)]
MODES = {"A": 0, "L": 0, "R": 1, "M1": 0, "M2": 1, "M3": 2}
SETTINGS = dict(lr=1e-2, precondition_frequency=5, max_preconditioner_dim=16)


def parameters():
    return [torch.nn.Parameter(next(gradients(s, 1, seed=i)).float()) for i, s in enumerate(SHAPES)]


def give(params, t):
    for i, p in enumerate(params):
        p.grad = next(gradients(p.shape, 1, seed=100 * t + i)).float()


def walk(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        give(params, t)
        optimizer.step()


@pytest.mark.parametrize("variant", PRECONDITIONED)
def test_every_number_is_the_same_with_and_without(variant):
    """The bits of parameters and state, whatever is written down and read; what was counted is what
    the rows say."""
    ends = []
    for every in (None, 1, 7):
        params = parameters()
        optimizer = make(variant, params, max_preconditioner_dim=16)
        found = []
        if every is not None:
            optimizer.telemetry = Telemetry(optimizer, every=every)
        for t in range(24):
            walk(optimizer, params, 1, start=t)
            if every is not None and t % 6 == 0:
                found += optimizer.telemetry.rows()
        ends.append((params, optimizer.state_dict()["state"]))
        if every is None:
            continue
        found += optimizer.telemetry.rows()
        steps = sorted({row["global_step"] for row in found})
        first = [1] if late(variant) else []
        checks = first + [5 + late(variant) + 5 * i for i in range(4)]
        thinned = [s for s in checks if s in (1, 11, 21)] if late(variant) else [5, 15]
        assert steps == (checks if every == 1 else thinned)
        for row in found:
            assert tuple(row) == COLUMNS
            block = blocks_of(optimizer, int(row["parameter"]))[row["block"]]
            mode = MODES[row["factor"]]
            if row["global_step"] == checks[-1]:
                for name in ("checks", "refreshes", "failures"):
                    assert row[name] == block[f"{name}_{mode}"], row
    for (expected, states), (params, others) in ((ends[0], end) for end in ends[1:]):
        for p, q in zip(expected, params, strict=True):
            assert torch.equal(p, q)
        for number, entry in states.items():
            for name, value in entry.items():
                same = torch.equal if torch.is_tensor(value) else lambda a, b: a == b
                assert same(value, others[number][name]), name


@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_rows_say_what_a_float64_computation_says(tau):
    """Criterion before, eigenvalues after; who was decomposed, and how old the basis was."""
    params = parameters()
    optimizer = EShampoo(params, tau=tau, **SETTINGS)
    optimizer.telemetry = Telemetry(optimizer)
    last = {}
    refreshed = kept = 0
    for t in range(1, 31):
        before = copy.deepcopy(optimizer.state_dict()["state"]) if t % 5 == 0 else None
        walk(optimizer, params, 1, start=t)
        rows = optimizer.telemetry.rows()
        assert bool(rows) == (t % 5 == 0)
        for row in rows:
            param, j = int(row["parameter"]), row["block"]
            i = MODES[row["factor"]]
            state = optimizer.state_dict()["state"][param]
            factor = state[f"{j}.factor_{i}"].double()
            old = before[param][f"{j}.operator_{i}"].double()
            assert row["size"] == len(factor) and row["global_step"] == t
            criterion = reference.relative_off_diagonal(factor, old)
            assert float(row["criterion"]) == pytest.approx(criterion, rel=1e-3, abs=1e-6)
            assert (
                row["refreshed"]
                == (criterion > tau)
                == (not torch.equal(old, state[f"{j}.operator_{i}"].double()))
            )
            assert row["staleness"] == t - last.get((param, j, i), 0)
            if row["refreshed"]:
                last[param, j, i] = t
                refreshed += 1
                lam = torch.linalg.eigvalsh(factor)
                assert float(row["largest"]) == pytest.approx(lam[-1].item(), rel=1e-4)
                assert float(row["smallest"]) == pytest.approx(
                    lam[0].item(), rel=1e-4, abs=1e-6 * lam[-1].item()
                )
                p = lam.clamp_min(0) / lam.clamp_min(0).sum()
                rank = math.exp(torch.special.entr(p).sum().item())
                assert float(row["effective_rank"]) == pytest.approx(rank, rel=1e-3)
            else:
                kept += 1
    assert refreshed and bool(kept) == (tau > 0)


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_an_ordinary_step_does_nothing_for_it():
    """Not one operation more; at a check that is not written down eigenvalues are copied."""
    counts = []
    for watched in (False, True):
        params = parameters()
        optimizer = EShampoo(params, **SETTINGS)
        if watched:
            optimizer.telemetry = Telemetry(optimizer, every=1000)
        mine = []
        for t in range(1, 17):
            give(params, t)
            with Operations() as operations:
                optimizer.step()
            mine.append(operations.count)
        counts.append(mine)
    without, with_it = counts
    more = {t: b - a for t, (a, b) in enumerate(zip(without, with_it, strict=True), 1) if b != a}
    assert set(more) == {5, 10, 15} and without[0] > 10  # at 10 the first is summed up
    assert more[15] <= 4 * len(list(optimizer.factor_sets()))


def test_failures_and_what_is_not_finite_are_there(monkeypatch):
    params = parameters()
    optimizer = EShampoo(params, nonfinite_gradients="propagate", **SETTINGS)
    optimizer.telemetry = Telemetry(optimizer, [(n, "weight") for n in "abcd"])
    for t in range(1, 6):
        give(params, t)
        params[1].grad[0] = torch.nan
        optimizer.step()
    (bad,) = [row for row in optimizer.telemetry.rows() if row["parameter"] == "b"]
    assert (bad["factor"], bad["refreshed"], bad["failures"], bad["refreshes"]) == ("A", 0, 1, 0)
    assert bad["criterion"] == bad["condition"] == bad["largest"] == ""

    def fail(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(exact.torch.linalg, "eigh", fail)
    params[1].grad = None
    for t in range(6, 11):
        give(params, t)
        params[1].grad = None
        optimizer.step()
    rows = [row for row in optimizer.telemetry.rows() if row["parameter"] == "a"]
    assert [(r["refreshed"], r["refreshes"], r["failures"]) for r in rows] == [(0, 1, 1)] * 2
    assert all(row["staleness"] == 5 and row["largest"] for row in rows)


def test_a_step_that_failed_half_way_is_written_down_once(monkeypatch):
    params = parameters()
    optimizer = EShampoo(params, **SETTINGS)
    optimizer.telemetry = Telemetry(optimizer)
    walk(optimizer, params, 4)
    give(params, 4)
    eigh, calls = torch.linalg.eigh, []

    def once_out_of_memory(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return eigh(*arguments)

    monkeypatch.setattr(exact.torch.linalg, "eigh", once_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    optimizer.step()
    rows = optimizer.telemetry.rows()
    assert len(rows) == len({(r["parameter"], r["block"], r["factor"]) for r in rows}) == 10
    assert {(r["global_step"], r["refreshed"], r["staleness"]) for r in rows} == {(5, 1, 5)}


@pytest.mark.parametrize("variant", ["eshampoo_adaptive", "kl_soap", "shampoo_grafting"])
def test_a_loaded_state_goes_on_with_the_same_rows(variant):
    whole = parameters()
    optimizer = make(variant, whole, max_preconditioner_dim=16)
    optimizer.telemetry = Telemetry(optimizer, every=7)
    walk(optimizer, whole, 17)
    optimizer.telemetry.rows()
    state = copy.deepcopy((optimizer.state_dict(), optimizer.telemetry.state_dict()))
    halves = [torch.nn.Parameter(p.detach().clone()) for p in whole]
    twin = make(variant, halves, max_preconditioner_dim=16)
    twin.telemetry = Telemetry(twin, every=7)
    twin.load_state_dict(state[0])
    twin.telemetry.load_state_dict(state[1])
    for o, p in ((optimizer, whole), (twin, halves)):
        walk(o, p, 25, start=17)
    rows = optimizer.telemetry.rows()
    assert rows == twin.telemetry.rows() and len({r["global_step"] for r in rows}) > 1


def test_copies_are_not_watched_and_options_are_checked():
    params = parameters()
    optimizer = EShampoo(params, **SETTINGS)
    optimizer.telemetry = Telemetry(optimizer)
    assert copy.deepcopy(optimizer).telemetry is None
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Telemetry(optimizer, every=0)
    assert Telemetry(make("nadamw", params)).rows() == []


def test_kinds_of_parameters():
    net = torch.nn.Sequential()
    net.add_module("embed", torch.nn.Embedding(5, 4))
    net.add_module("0", torch.nn.Linear(4, 4))
    net.add_module("norm", torch.nn.LayerNorm(4))
    net.add_module("batch", torch.nn.BatchNorm1d(4))
    net.module = torch.nn.Module()
    net.module.pos_embedding = torch.nn.Parameter(torch.zeros(3))
    assert describe(net) == [
        ("embed.weight", "embedding"),
        ("0.weight", "weight"),
        ("0.bias", "bias"),
        ("norm.weight", "norm"),
        ("norm.bias", "norm"),
        ("batch.weight", "norm"),
        ("batch.bias", "norm"),
        ("pos_embedding", "embedding"),
    ]
    assert {kind for _, kind in describe(net)} == set(KINDS)


def test_a_condition_number_ends_where_rounding_begins():
    eps = torch.finfo(torch.float32).eps
    assert condition(4.0, 2.0, 8, eps) == 2
    assert condition(4.0, -1e-9, 8, eps) == pytest.approx(1 / (8 * eps))
    assert math.isnan(condition(0.0, 0.0, 8, eps))


def share(rank, port, folder):
    """Two processes, each of which has seen the factors of half of the parameters."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    params = parameters()
    optimizer = EShampoo(params, **SETTINGS)
    watching = optimizer.telemetry = Telemetry(optimizer)
    watching.shared = True
    for key, watched in list(watching._watched.items()):
        if watched.factor_set.n % 2 != rank:
            del watching._watched[key]
    walk(optimizer, params, 11)
    watching.gather(dist.group.WORLD)
    torch.save((watching.rows(), watching.state_dict()), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_ranks_have_seen_comes_to_the_first(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(share, args=(port, str(tmp_path)), nprocs=2)
    (rows, state), (others, _) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    params = parameters()
    optimizer = EShampoo(params, **SETTINGS)
    optimizer.telemetry = Telemetry(optimizer)
    walk(optimizer, params, 11)
    assert rows == optimizer.telemetry.rows() and others == []
    assert state == optimizer.telemetry.state_dict()


def test_the_document_explains_every_column():
    from pathlib import Path

    text = (Path(__file__).resolve().parents[2] / "docs" / "telemetry.md").read_text()
    named = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert [name for cell in named for name in csv_names(cell)] == list(COLUMNS)


def csv_names(cell):
    (names,) = csv.reader([cell.replace("`", "").replace(" ", "")])
    return names
