"""What tests of sharding run on every rank."""

import contextlib
import copy
import pickle
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from algoperf_shampoo import submission
from algoperf_shampoo.optim import optimizer as steps
from algoperf_shampoo.optim.blocks.memory import GRADIENT
from algoperf_shampoo.optim.eigen import exact
from algoperf_shampoo.optim.nonfinite import NonFiniteGradientError
from algoperf_shampoo.optim.telemetry import Telemetry

from .support import STARTS, make

SHAPES = [(24, 10), (17,), (6, 5, 4), (40, 9), (3,), (1,), (33, 20), (16, 16)]
# Whose first gradients have full rank: of others null spaces are arbitrary, and rounding decides.
SQUARE = [(10, 10), (12, 12), (48, 16), (11, 11), (16, 16)]
SETTINGS = {"precondition_frequency": 3, "max_preconditioner_dim": 16}


def parameters(dtype=torch.float32, shapes=SHAPES):
    g = torch.Generator().manual_seed(5)
    return [
        torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype))
        for s in shapes
    ]


def set_gradients(params, t, trouble=""):
    """Gradients of step t: "missing" leaves some out, "bad" has a NaN in one block of one."""
    g = torch.Generator().manual_seed(100 + t)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
        if trouble == "missing" and (i + t) % 4 == 0:
            p.grad = None
        if trouble == "bad" and i == 3 and t in (2, 6):
            p.grad[-1, -1] = torch.nan


def build(group, variant, params, sharding="on", **settings):
    return make(variant, params, process_group=group, sharding=sharding, **{**SETTINGS, **settings})


def train(group, variant, steps, trouble="", dtype=torch.float64, sharding="on", **settings):
    """Parameters, state and counts after some steps; state only of rank 0, as AlgoPerf saves it."""
    params = parameters(dtype, SQUARE if variant in STARTS else SHAPES)
    if trouble == "groups":
        params = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
    optimizer = build(group, variant, params, sharding, **settings)
    params = [p for some in optimizer.param_groups for p in some["params"]]
    for t in range(1, steps + 1):
        set_gradients(params, t, trouble)
        optimizer.step()
    optimizer.gather_state(to=0)
    layouts = [group.layout for group in optimizer._groups]
    return {
        "params": [p.detach().clone() for p in params],
        "state": optimizer.state_dict() if layouts[0].rank == 0 else None,
        "blocks": sum(len(s) for x in layouts for s in x.stacks),
        "factors": sum(f.numel() for x in layouts for s in x.stacks for f in s.factors),
        "skipped": optimizer.skipped_gradients(),
        "differ": optimizer.replicas_differ(),
    }


def resume(group, variant, saved, first, steps, dtype=torch.float64):
    """Go on from what :func:`train` gave; parameters and all of the state at the end."""
    params = parameters(dtype, SQUARE if variant in STARTS else SHAPES)
    for p, value in zip(params, saved["params"], strict=True):
        p.data.copy_(value)
    optimizer = build(group, variant, params)
    optimizer.load_state_dict(copy.deepcopy(saved["state"]))
    for t in range(first, first + steps):
        set_gradients(params, t)
        optimizer.step()
    optimizer.gather_state()
    return {"params": [p.detach().clone() for p in params], "state": optimizer.state_dict()}


def refusals(group):
    """What state_dict, pickles and copies say before and after state is gathered to rank 0."""
    params = parameters()
    optimizer = build(group, "eshampoo_fixed", params)

    def said():
        found = []
        for action in (optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
            try:
                action()
                found.append("")
            except RuntimeError as error:
                found.append(str(error))
        return found

    every = [said()]
    for to in (0, None):
        optimizer.gather_state(to)
        every.append(said())
        if to is None:
            again = pickle.loads(pickle.dumps(optimizer.state_dict()))
            every[-1].append(sorted(again["state"][0]))
        set_gradients(params, 1)
        optimizer.step()
        every.append(said())
    live = optimizer.state[params[6]]
    return every, sorted({x.device.type for x in live.values() if isinstance(x, torch.Tensor)})


def checkpointed(group, folder, flatten):
    """A round trip by torch.distributed.checkpoint; the movement after it, and without it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    ends = []
    for saves in (True, False):
        model = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.Linear(33, 40))
        params = list(model.parameters())
        values = parameters(shapes=[p.shape for p in params])
        for p, value in zip(params, values, strict=True):
            p.data.copy_(value)
        optimizer = build(group, "eshampoo_fixed", params)
        for t in range(1, 8):
            if t == 5 and saves:
                optimizer.gather_state()
                state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
                dcp.save(state, checkpoint_id=folder, process_group=group)
                optimizer = build(group, "eshampoo_fixed", params)
                optimizer.gather_state()
                found = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
                dcp.load(found, checkpoint_id=folder, process_group=group)
                set_optimizer_state_dict(model, optimizer, found["optimizer"], options=options)
            set_gradients(params, t)
            optimizer.step()
        ends.append([p.detach().clone() for p in params])
    return ends


def unequal(group, where):
    """Gradients (or a parameter) of the last rank are off at one step: by a bit in one entry, or up
    in one entry and down in another."""
    params = parameters()
    optimizer = build(group, "eshampoo_fixed", params)
    found = []
    for t in range(1, 7):
        set_gradients(params, t)
        if t == 3 and dist.get_rank(group) == dist.get_world_size(group) - 1:
            x = params[6].data if where == "parameter" else params[6].grad
            x.view(torch.int32)[0, 0] += 1
            x.view(torch.int32)[0, 1] -= int(where == "two entries")
        optimizer.step()
        if t % 3 == 0:
            found.append(optimizer.replicas_differ())
    return found


def failing(group):
    """A solver raises on rank 1 alone; called again, its step ends as one that did not fail."""
    ends = []
    for fails in (False, True):
        params = parameters()
        optimizer = build(group, "eshampoo_fixed", params)
        for t in range(1, 8):
            set_gradients(params, t)
            if fails and t == 3 and dist.get_rank(group) == 1:
                with _raising(exact, "exact"):
                    optimizer.step()
            optimizer.step()
        ends.append([p.detach().clone() for p in params])
    return ends


@contextlib.contextmanager
def _raising(module, name):
    """A function of a module has no memory, and what is done meanwhile ends with that."""

    def fail(*arguments, **more):
        raise MemoryError

    before = getattr(module, name)
    setattr(module, name, fail)
    try:
        with contextlib.suppress(MemoryError):
            yield
    finally:
        setattr(module, name, before)


def stalled(group, frequency):
    """Rank 1 does not come; what the others say."""
    if dist.get_rank(group) == 1:
        return ""
    params = parameters()
    optimizer = build(group, "shampoo", params, precondition_frequency=frequency)
    set_gradients(params, 1)
    said = []
    for _ in range(2):
        try:
            optimizer.step()
        except RuntimeError as error:
            said.append(str(error))
    return said


def odd_shapes(group, variant):
    """Groups of no parameters, of one block, and of parameters with a block of one entry (which has
    no factors) beside others: how far each went, and all that is counted."""
    params = parameters(torch.float64, [(12, 12), (33,), (17, 17)])
    start = [p.detach().clone() for p in params]
    groups = [{"params": some} for some in ([], params[:1], [], params[1:])]
    optimizer = build(group, variant, groups)
    for t in range(1, 8):
        set_gradients(params, t)
        optimizer.step()
    optimizer.gather_state()
    moved = [float((p - s).norm().detach()) for p, s in zip(params, start, strict=True)]
    counts = [
        {k: int(x) for k, x in entry.items() if k == "step" or not isinstance(x, torch.Tensor)}
        for entry in optimizer.state_dict()["state"].values()
    ]
    return moved, counts


def always_bad(group):
    """At a check, each of two gradients was bad: what is said. One block, so a rank has none."""
    (param,) = params = parameters(shapes=[(12, 12)])
    optimizer = build(group, "eshampoo_fixed", params, precondition_frequency=2, nonfinite_limit=2)
    for _ in range(2):
        param.grad = torch.full_like(param, torch.nan)
        try:
            optimizer.step()
        except NonFiniteGradientError as error:
            return str(error)
    return ""


def measured(group, checkpoint):
    """The measurements of an evaluation that a checkpoint follows, or not."""
    params = parameters()
    optimizer = build(group, "eshampoo_fixed", params)
    for t in range(1, 8):
        set_gradients(params, t)
        optimizer.step()
    found = {}
    workload = SimpleNamespace(
        metrics_logger=SimpleNamespace(append_scalar_metrics=lambda m, step: found.update(m))
    )
    state = {"optimizer": optimizer, "monitor": submission.Monitor()}
    before = submission._checkpoint_follows
    submission._checkpoint_follows = lambda: checkpoint
    try:
        submission.Submission(None, ()).prepare_for_eval(
            workload, None, None, None, None, None, state, [], 7, None
        )
    finally:
        submission._checkpoint_follows = before
    return found


def worked_in(group, sharding):
    """Whether gradients are said to differ where what lies beside them does, as after a refresh."""
    params = parameters()
    optimizer = build(group, "eshampoo_fixed", params, sharding)
    for t in range(1, 7):
        set_gradients(params, t, "missing")
        for x in optimizer._groups[0].layout.flat(GRADIENT):
            x.fill_(dist.get_rank(group))
        optimizer.step()
    return optimizer.replicas_differ()


def overflowing(group, saved):
    """Step counts after a state is loaded that is finite in float64 alone, in one parameter."""
    optimizer = build(group, "eshampoo_fixed", parameters())
    state = copy.deepcopy(saved)
    state["state"][0]["0.exp_avg"] = state["state"][0]["0.exp_avg"].double() + 1e300
    optimizer.load_state_dict(state)
    optimizer.gather_state()
    return [int(entry["step"]) for entry in optimizer.state_dict()["state"].values()]


def outside(group):
    """What is said to a process that is not in the group, and to one that asks for no rank."""
    some = dist.new_group([0])
    said = []
    for action in (
        lambda: build(some, "eshampoo_fixed", parameters()),
        lambda: build(group, "eshampoo_fixed", parameters()).gather_state(to=4),
    ):
        try:
            action()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def fsdp(group):
    """What is said to parameters of which each rank has a piece."""
    said = []
    for shard in (
        lambda model: fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu")),
        lambda model: FullyShardedDataParallel(model, group, device_id=torch.device("cpu")),
        lambda model: FullyShardedDataParallel(
            model, group, device_id=torch.device("cpu"), use_orig_params=True
        ),
    ):
        model = shard(torch.nn.Linear(8, 8))
        try:
            build(group, "eshampoo_fixed", list(model.parameters()))
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def watched(group):
    """Rows of telemetry at two evaluations, and with what rank 0 saved at the first one loaded by
    all; how many checks of its own it had. The dearest block, rank 0's, never has a gradient."""
    rows = []
    for resumes in (False, True):
        params = parameters(shapes=[(16, 16), (12, 12), (7, 7)])
        optimizer = build(group, "eshampoo_fixed", params)
        optimizer.telemetry = Telemetry(optimizer, every=5)
        for t in range(1, 16):
            set_gradients(params, t)
            params[0].grad = None
            optimizer.step()
            if t == 9:
                optimizer.telemetry.gather(group)
                before = optimizer.telemetry.rows()
                if resumes:
                    saved = [optimizer.telemetry.state_dict()]
                    dist.broadcast_object_list(saved, dist.get_global_rank(group, 0), group)
                    optimizer.telemetry.load_state_dict(saved[0])
        optimizer.telemetry.gather(group)
        rows.append(before + optimizer.telemetry.rows())
    return rows, sum(sum(s.checks) for s in optimizer.factor_sets())


def loaded_after_a_failure(group, saved):
    """Whether replicas differ after a step that failed on one rank past the exchange, and a state
    that all load then."""
    params = parameters(torch.float64, SQUARE)
    optimizer = build(group, "kl_shampoo", params)
    for t in range(1, 9):
        set_gradients(params, t)
        if t == 4 and dist.get_rank(group) == 1:
            with _raising(steps, "refresh"):
                optimizer.step()
            assert optimizer._journal
        else:
            optimizer.step()
        if t == 4:
            optimizer.load_state_dict(saved)
    return optimizer.replicas_differ()


def loaded_by_one(group, saved):
    """Whether replicas differ after a step, where the last rank alone has loaded a state."""
    params = parameters()
    optimizer = build(group, "eshampoo_fixed", params)
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        optimizer.load_state_dict(saved)
    set_gradients(params, 1)
    optimizer.step()
    return optimizer.replicas_differ()


def lacking(group, variant, at):
    """Whether replicas differ, where one lacks the gradient of a parameter at one step."""
    params = parameters(torch.float64, SQUARE)
    optimizer = build(group, variant, params)
    for t in range(1, 8):
        set_gradients(params, t)
        if t == at and dist.get_rank(group) == 1:
            params[1].grad = None
        optimizer.step()
    return optimizer.replicas_differ()
