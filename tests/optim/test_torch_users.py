"""What a user of torch.optim relies on, in what is saved, copied and loaded: the same of ours as of
torch.optim.AdamW, and what ours refuse besides."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from algoperf_shampoo.optim import AdamW, EShampoo, Shampoo

from .torch_users import OURS, like_torch, model, ours, same, train, weights

# torch.distributed.checkpoint


@ours
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("steps", [0, 7])
def test_distributed_checkpoint_goes_on_to_the_bit(build, flat, steps, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net = model()
    optimizer = build(net.parameters())
    train(net, optimizer, steps)
    before = optimizer.state_dict()
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    assert same(optimizer.state_dict(), before)  # no hidden step
    twin = copy.deepcopy(net)
    fresh = build(twin.parameters())
    if build is OURS["eshampoo"]:  # through files
        found = get_optimizer_state_dict(twin, fresh, options=options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process: said so at length
            dcp.save(saved, checkpoint_id=tmp_path / "saved")
            dcp.load(found, checkpoint_id=tmp_path / "saved")
        saved = found
    set_optimizer_state_dict(twin, fresh, saved, options=options)
    assert same(fresh.state_dict(), before)
    train(net, optimizer, 8, start=steps)
    train(twin, fresh, 8, start=steps)
    assert same(weights(twin), weights(net))
    assert same(fresh.state_dict(), optimizer.state_dict())


@ours
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoint_leaves_frozen_parameters_out(build, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net = model()
    net[0].weight.requires_grad_(False)
    optimizer = build(net.parameters())
    train(net, optimizer, 4)
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    twin = copy.deepcopy(net)
    fresh = build(twin.parameters())
    set_optimizer_state_dict(twin, fresh, saved, options=options)
    assert same(fresh.state_dict(), optimizer.state_dict())


@ours
def test_distributed_checkpoint_with_the_full_state_from_rank_0(build):
    options = StateDictOptions(full_state_dict=True)
    net = model()
    optimizer = build(net.parameters())
    train(net, optimizer, 7)
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    twin = copy.deepcopy(net)
    fresh = build(twin.parameters())
    set_optimizer_state_dict(twin, fresh, saved, options=options)
    assert same(fresh.state_dict(), optimizer.state_dict())


# The state


@ours
def test_state_is_there_from_construction_live_and_flat(build):
    net = model()
    optimizer = build(net.parameters())
    assert set(optimizer.state) == set(net.parameters())
    views = {p: dict(entry) for p, entry in optimizer.state.items()}
    train(net, optimizer, 7)
    packed = optimizer.state_dict()["state"]
    for number, (p, entry) in enumerate(optimizer.state.items()):
        assert entry["step"] == 7 - optimizer.rule.starts
        assert same(dict(entry), packed[number])
        for name, value in entry.items():
            assert isinstance(value, torch.Tensor | int | float)
            if isinstance(value, torch.Tensor):
                assert value is views[p][name]
    if optimizer.rule.has_factors:
        first = optimizer.state[net[0].bias]
        assert first["0.checks_0"] == 2 + optimizer.rule.starts
        assert first["0.refreshes_0"] >= 1
        assert first["0.ready"] == 1


@ours
def test_the_live_state_takes_no_memory_of_its_own(build):
    net = model()
    optimizer = build(net.parameters())
    stacks = [s for g in optimizer._groups for s in g.layout.stacks]
    owned = {
        x.untyped_storage().data_ptr()
        for s in stacks
        for x in itertools.chain(s.state.values(), *s.vectors.values(), s.factors, s.operators)
    }
    for entry in optimizer.state.values():
        for name, x in entry.items():
            if isinstance(x, torch.Tensor) and name != "step":
                assert x.untyped_storage().data_ptr() in owned


@ours
def test_a_held_state_dict_stands_still(build):
    net = model()
    optimizer = build(net.parameters())
    train(net, optimizer, 4)
    held = optimizer.state_dict()
    then = copy.deepcopy(held)
    train(net, optimizer, 4, start=4)
    assert same(held, then)
    assert not same(held, optimizer.state_dict())
    optimizer.load_state_dict(held)
    train(net, optimizer, 4, start=4)
    assert same(held, then)


# Copies


@like_torch
def test_deepcopy_goes_on_to_the_bit_and_apart(build):
    net = model()
    optimizer = build(net.parameters())
    train(net, optimizer, 4)
    kept, twin = copy.deepcopy((net, optimizer))
    before = weights(net)
    train(kept, twin, 5, start=4)
    assert same(weights(net), before)
    train(net, optimizer, 5, start=4)
    assert same(weights(kept), weights(net))
    assert same(twin.state_dict(), optimizer.state_dict())
    assert type(twin) is type(optimizer)
    assert repr(twin).replace("    differentiable: False\n", "") == repr(optimizer).replace(
        "    differentiable: False\n", ""
    )


@like_torch
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickles_go_on_to_the_bit(build, how):
    net = model()
    optimizer = build(net.parameters())
    train(net, optimizer, 4)
    if how == "pickle":
        kept, twin = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((net, optimizer), file)
        file.seek(0)
        kept, twin = torch.load(file, weights_only=False)
    train(kept, twin, 5, start=4)
    train(net, optimizer, 5, start=4)
    assert same(weights(kept), weights(net))
    twin.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.5})
    assert twin.param_groups[1]["lr"] == 0.5


@ours
def test_a_pickle_holds_parameters_and_state_and_nothing_else(build):
    """Views would drag along all that shares their memory, the gradient buffer for one."""
    weight = torch.nn.Parameter(torch.ones(200, 100))
    optimizer = build([weight])
    entries = weight.numel() + sum(
        x.numel() for x in optimizer.state[weight].values() if isinstance(x, torch.Tensor)
    )
    assert 4 * entries < len(pickle.dumps(optimizer)) < 4 * entries + 12_000
    file = io.BytesIO()
    torch.save(optimizer, file)
    assert 4 * entries < file.tell() < 4 * entries + 12_000


def test_a_copy_keeps_the_process_group_and_a_pickle_only_that_of_all():
    from algoperf_shampoo.optim.replicas import Replicas

    group = object()  # stands for a subgroup
    held = Replicas(group)
    assert copy.deepcopy(held).group is group
    with pytest.raises(TypeError, match="WORLD"):
        pickle.dumps(held)
    assert pickle.loads(pickle.dumps(Replicas(None))).group is None


# Hooks


@like_torch
def test_hooks_are_called(build):
    net = model()
    optimizer = build(net.parameters())
    called = []
    optimizer.register_state_dict_pre_hook(lambda o: called.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: called.append(s["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda o: called.append("loaded"))
    optimizer.register_step_pre_hook(lambda o, a, k: called.append("step"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    train(net, optimizer, 1)
    assert called == ["save", 1, "loaded", "step"]


def test_a_load_hook_may_give_another_state_dict():
    net = model()
    optimizer = EShampoo(net.parameters())
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda o, s: s["inside"])
    optimizer.load_state_dict({"inside": saved})
    assert same(optimizer.state_dict(), saved)


# What is not this optimizer's is refused


def refused(optimizer, saved, match):
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    assert same(optimizer.state_dict(), before)


OTHERS = {
    "another rule": (lambda p: Shampoo(p), "rule is 'Shampoo', this optimizer's 'EShampoo'"),
    "AdamW of ours": (lambda p: AdamW(p), "rule is 'AdamW', this optimizer's 'EShampoo'"),
    "one_dim": (lambda p: EShampoo(p, one_dim="adam"), "one_dim is 'adam', this .* 'full'"),
    "blocks": (lambda p: EShampoo(p, max_preconditioner_dim=16), "max_pre.* is 16, .* 1024"),
    "small": (lambda p: EShampoo(p, small_matrices="matrix"), "small_matrices is 'matrix'"),
    "torch": (lambda p: torch.optim.AdamW(p), "names no rule"),
}


@pytest.mark.parametrize(("other", "match"), OTHERS.values(), ids=OTHERS)
def test_the_state_of_another_is_refused_naming_both(other, match):
    net = model()
    optimizer = EShampoo(net.parameters(), precondition_frequency=2)
    train(net, optimizer, 3)
    twin = copy.deepcopy(net)
    theirs = other(twin.parameters())
    train(twin, theirs, 3)
    refused(optimizer, theirs.state_dict(), match)


def test_another_grafting_is_refused():
    net = model()
    optimizer = Shampoo(net.parameters())
    for settings, match in (
        (dict(grafting=None), "grafting is None, this optimizer's 'adam'"),
        (dict(exponent_multiplier=0.5), "exponent_multiplier is 0.5, this optimizer's 1.0"),
        (dict(eps=1e-3), "eps is 0.001, this optimizer's 1e-08"),
    ):
        refused(optimizer, Shampoo(copy.deepcopy(net).parameters(), **settings).state_dict(), match)


def first(saved):
    return saved["state"][0]


DAMAGE = {
    "nothing": (lambda s: s.clear(), "no 'state'"),
    "no groups": (lambda s: s.pop("param_groups"), "no 'param_groups'"),
    "groups are no list": (lambda s: s.update(param_groups=3), "no 'param_groups'"),
    "no params": (lambda s: s["param_groups"][0].pop("params"), "no 'params'"),
    "one parameter less": (lambda s: s["param_groups"][0]["params"].pop(), r"sizes \[3\]"),
    "no state": (lambda s: s["state"].clear(), "parameter 0: no state"),
    "an entry is gone": (lambda s: s["state"].pop(2), "parameter 2: no state"),
    "a tensor is gone": (lambda s: first(s).pop("0.exp_avg"), "parameter 0: lacks 0.exp_avg"),
    "a key too many": (lambda s: first(s).update(x=1), "parameter 0: has x"),
    "a shape": (lambda s: first(s).update({"0.exp_avg": torch.ones(3)}), r"of shape \(3,\)"),
    "no tensor": (lambda s: first(s).update({"0.exp_avg": 3}), "0.exp_avg is int"),
    "integers": (
        lambda s: first(s).update({"0.exp_avg": torch.ones(40 * 30, dtype=torch.int64)}),
        "0.exp_avg is of torch.int64",
    ),
    "a negative step": (lambda s: first(s).update(step=-1), "step is -1"),
    "step is text": (lambda s: first(s).update(step="3"), "step is '3'"),
    "no lr": (lambda s: s["param_groups"][0].pop("lr"), "lacks lr"),
    "lr is nan": (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr must be"),
    "betas": (lambda s: s["param_groups"][0].update(betas=3), "betas must be"),
    "an older layout": (
        lambda s: s["state"].update({0: {"step": 1, "blocks": []}}),
        "kept lists of blocks",
    ),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_is_refused(damage, match):
    net = model()
    optimizer = EShampoo(net.parameters(), precondition_frequency=2)
    train(net, optimizer, 3)
    saved = optimizer.state_dict()
    damage(saved)
    refused(optimizer, saved, match)


@ours
def test_loading_restores_the_options_as_torch_does(build):
    net = model()
    optimizer = build(net.parameters(), weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    train(net, optimizer, 2)
    scheduler.step()
    fresh = build(net.parameters())
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["weight_decay"] == 0.5
    assert fresh.param_groups[0]["initial_lr"] == 0.01
