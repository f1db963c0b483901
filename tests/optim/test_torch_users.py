"""What a user of torch.optim relies on: the same of ours as of torch.optim.AdamW, and what ours
refuse besides."""

import copy
import inspect
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import algoperf_shampoo
from algoperf_shampoo.optim import AdamW, EShampoo, Shampoo, Solver

OURS = {
    "adamw": lambda p, **k: AdamW(p, lr=0.01, **k),
    "shampoo": lambda p, **k: Shampoo(p, lr=0.01, precondition_frequency=3, **k),
    "ungrafted": lambda p, **k: Shampoo(
        p, lr=0.01, precondition_frequency=3, grafting=None, **{"eps": 1e-3, **k}
    ),
    "eshampoo": lambda p, **k: EShampoo(p, lr=0.01, precondition_frequency=3, tau=0.1, **k),
}
ALL = {**OURS, "torch": lambda p, **k: torch.optim.AdamW(p, lr=0.01, **k)}
ours = pytest.mark.parametrize("build", OURS.values(), ids=OURS)
like_torch = pytest.mark.parametrize("build", ALL.values(), ids=ALL)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 6))


def train(net, optimizer, steps, start=0):
    for t in range(start, start + steps):
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        (net(x) - x[:, :6]).square().mean().backward()
        optimizer.step()


def same(one, other):
    """Equal to the bit, through dicts and sequences."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        keys = one.keys() == other.keys()
        return keys and all(same(x, other[name]) for name, x in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


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
        assert entry["step"] == 7
        assert same(dict(entry), packed[number])
        for name, value in entry.items():
            assert isinstance(value, torch.Tensor | int | float)
            if isinstance(value, torch.Tensor):
                assert value is views[p][name]
    if optimizer.rule.has_factors:
        first = optimizer.state[net[0].bias]
        assert first["0.checks_0"] == 2
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
        for x in (*s.state.values(), *s.factors, *s.operators)
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


# Groups


@like_torch
def test_an_empty_group_is_accepted(build):
    net = model()
    optimizer = build([{"params": []}, {"params": net.parameters()}])
    train(net, optimizer, 4)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert same(optimizer.state_dict(), saved)
    with pytest.raises(ValueError, match="empty"):
        build([])


BAD_GROUPS = {
    "a negative lr": {"lr": -1.0},
    "a parameter of another group": {"params": None},
    "a number": {"params": [3]},
    "integers": {"params": [torch.ones(2, dtype=torch.int64)]},
    "an option of none": {"fused": True},
}


@ours
@pytest.mark.parametrize("bad", BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_a_refused_group_leaves_the_optimizer_as_it_was(build, bad):
    net = model()
    optimizer = build(net.parameters())
    train(net, optimizer, 2)
    before, text, count = optimizer.state_dict(), repr(optimizer), len(optimizer.state)
    group = {"params": [torch.nn.Parameter(torch.ones(5, 4))], **bad}
    group["params"] = group["params"] or [net[0].weight]
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(group)
    assert same(optimizer.state_dict(), before)
    assert repr(optimizer) == text
    assert len(optimizer.state) == count
    train(net, optimizer, 2, start=2)


@pytest.mark.parametrize(
    ("build", "option", "value", "match"),
    [
        (Shampoo, "tau", 0.1, "group of Shampoo has no option 'tau'; it has lr, "),
        (Shampoo, "eps", 1e-3, "eps is one for all groups of this Shampoo, 1e-08"),
        (Shampoo, "grafting_eps", 1e-3, "grafting_eps is one for all"),
        (Shampoo, "grafting", None, "grafting is one for all"),
        (AdamW, "tau", 0.1, "group of AdamW has no option 'tau'"),
        (AdamW, "one_dim", "adam", "no option 'one_dim'"),
        (AdamW, "fused", True, "no option 'fused'"),
        (EShampoo, "grafting_eps", 1e-3, "no option 'grafting_eps'"),
        (EShampoo, "eigensolver", "warm", "no option 'eigensolver'"),
        (EShampoo, "amsgrad", True, "no option 'amsgrad'"),
        (EShampoo, "rule", "AdamW", "rule is one for all"),
        (EShampoo, "one_dim", "half", "one_dim must be one of 'full', 'adam', got 'half'"),
    ],
)
def test_options_that_a_group_cannot_set_are_refused(build, option, value, match):
    weight = torch.nn.Parameter(torch.ones(5, 4))
    with pytest.raises(ValueError, match=match):
        build([{"params": [weight], option: value}])


def test_groups_may_differ_in_what_they_say():
    """F, tau, blocks and vectors: each group as an optimizer of its own."""
    net, twin = model(), model()
    one = dict(precondition_frequency=2, tau=0.0, one_dim="adam", max_preconditioner_dim=16)
    two = dict(precondition_frequency=3, tau=0.2, one_dim="full", small_matrices="matrix")
    together = EShampoo(
        [{"params": net[0].parameters(), **one}, {"params": net[2].parameters(), **two}], lr=0.01
    )
    apart = [
        EShampoo(part.parameters(), lr=0.01, **own)
        for part, own in ((twin[0], one), (twin[2], two))
    ]
    for t in range(9):
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(t))
        for n, optimizers in ((net, [together]), (twin, apart)):
            n.zero_grad()
            n(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert same(weights(net), weights(twin))


def test_options_that_may_change_are_followed_and_others_refused():
    net = model()
    optimizer = EShampoo(net.parameters(), lr=0.01, precondition_frequency=100)
    group, state = optimizer.param_groups[0], optimizer.state[net[0].weight]
    train(net, optimizer, 4)
    assert state["0.checks_0"] == 0
    group["precondition_frequency"] = 5
    train(net, optimizer, 1)
    assert state["0.refreshes_0"] == 1
    before = optimizer.state_dict()["state"], weights(net)
    for name, value, match in (
        ("one_dim", "adam", "one_dim is 'adam', this optimizer's 'full'"),
        ("precondition_frequency", 0, "precondition_frequency must be an integer >= 1"),
        ("weight_decay", float("inf"), "weight_decay must be a finite number"),
    ):
        kept, group[name] = group[name], value
        with pytest.raises(ValueError, match=match):
            train(net, optimizer, 1)
        group[name] = kept
    assert same((optimizer.state_dict()["state"], weights(net)), before)


# Parameters and gradients


def test_a_sparse_gradient_is_refused_by_number_and_nothing_changes():
    table = torch.nn.Embedding(9, 4, sparse=True)
    dense = torch.nn.Linear(4, 2)
    optimizer = EShampoo([{"params": dense.parameters()}, {"params": table.parameters()}])
    dense(table(torch.tensor([1, 2]))).sum().backward()
    before = optimizer.state_dict(), weights(dense), weights(table)
    with pytest.raises(ValueError, match="gradient of parameter 2 is sparse"):
        optimizer.step()
    assert same((optimizer.state_dict(), weights(dense), weights(table)), before)


@ours
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (torch.ones(3, dtype=torch.int64), "parameter 1 is of torch.int64"),
        (torch.ones(3, dtype=torch.complex64), "parameter 1 is of torch.complex64"),
        (torch.ones(3).to_sparse(), "parameter 1 is sparse"),
        (torch.ones(3, 0), "parameter 1 is empty"),
    ],
)
def test_bad_parameters_are_refused_by_number(build, bad, match):
    good = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=match):
        build([good, bad])
    with pytest.raises(ValueError, match=match):
        build([{"params": [good]}, {"params": [bad]}])


def test_sharded_parameters_are_refused_by_number():
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="parameter 0 is sharded"):
            EShampoo([torch.nn.Parameter(sharded)])
    finally:
        dist.destroy_process_group()


@ours
@pytest.mark.parametrize("name", ["weight_decay", "eps"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), "0.1", None, True])
def test_values_that_are_no_finite_numbers_are_refused(build, name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        build([torch.nn.Parameter(torch.ones(4))], **{name: value})


@ours
def test_blocks_whose_step_counts_differ_are_corrected_each_by_its_own(build):
    """A parameter that missed a gradient goes on as if trained alone."""
    torch.manual_seed(0)
    settings = {} if build is OURS["adamw"] else {"max_preconditioner_dim": 8}
    params = [torch.nn.Parameter(torch.randn(7, 5)) for _ in range(2)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    together = build(params, **settings)
    single = [build([p], **settings) for p in alone]
    for t in range(9):
        for i, (p, q) in enumerate(zip(params, alone, strict=True)):
            p.grad = None if (t, i) == (3, 1) else torch.randn(7, 5)
            q.grad = None if p.grad is None else p.grad.clone()
        together.step()
        for optimizer in single:
            optimizer.step()
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert [together.state[p]["step"].item() for p in params] == [9, 8]


# Costs


def test_a_thin_long_matrix_is_warned_of_once():
    thin = torch.nn.Parameter(torch.zeros(9 * 1024, 16))
    with pytest.warns(UserWarning, match="max_preconditioner_dim") as caught:
        optimizer = EShampoo([thin])
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "(9216, 16)" in text
    assert "72 MiB, 128 times the parameter" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thin.grad = torch.ones_like(thin)
        optimizer.step()
        EShampoo([{"params": [thin], "max_preconditioner_dim": 64}])
        EShampoo([torch.nn.Parameter(torch.zeros(1024, 1024))])
        EShampoo([torch.nn.Parameter(torch.zeros(9 * 1024))], one_dim="adam")
    with pytest.warns(UserWarning, match='one_dim="adam"'):
        EShampoo([torch.nn.Parameter(torch.zeros(9 * 1024))])


# Signatures


@pytest.mark.parametrize("build", [EShampoo, Shampoo, AdamW])
def test_signatures_are_explicit_and_documented(build):
    parameters = inspect.signature(build).parameters
    kinds = {p.kind for p in parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert list(parameters)[:5] == ["params", "lr", "betas", "eps", "weight_decay"]
    theirs = inspect.signature(torch.optim.AdamW).parameters
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert parameters[name].default == theirs[name].default
    documented = (build.__doc__ or "") + (EShampoo.__doc__ or "")
    assert all(name in documented for name in parameters)
    weight = torch.nn.Parameter(torch.ones(4, 3))
    assert build([weight], 0.5).param_groups[0]["lr"] == 0.5
    with pytest.raises(TypeError, match="learning_rate"):
        build([weight], learning_rate=0.5)


def test_repr_names_rule_frequency_threshold_and_vectors():
    text = repr(EShampoo([torch.nn.Parameter(torch.ones(4))], tau=0.1, precondition_frequency=7))
    assert text.startswith("EShampoo (")
    for line in ("rule: EShampoo", "precondition_frequency: 7", "tau: 0.1", "one_dim: full"):
        assert line in text
    assert "grafting: adam" in repr(Shampoo([torch.nn.Parameter(torch.ones(4))]))


def test_the_eigensolver_goes_by_its_documented_name():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    assert EShampoo([weight], eigensolver="warm").solver == Solver(method="warm")
    given = EShampoo([weight], eigensolver="eigh", eigen_workspace_mib=64).solver
    assert given == Solver(workspace_mib=64)
    own = Solver(method="warm", max_iterations=2)
    assert EShampoo([weight], eigensolver=own).solver is own
    with pytest.raises(ValueError, match="method must be one of eigh, warm, got 'qr'"):
        EShampoo([weight], eigensolver="qr")
    with pytest.raises(ValueError, match="workspace_mib must be >= 1"):
        EShampoo([weight], eigen_workspace_mib=0)
    with pytest.raises(ValueError, match="eigen_workspace_mib"):
        EShampoo([weight], eigensolver=own, eigen_workspace_mib=8)


def test_the_package_says_that_it_is_typed():
    assert (Path(algoperf_shampoo.__file__).parent / "py.typed").is_file()


@like_torch
def test_named_parameters_and_schedulers(build):
    net = model()
    optimizer = build(net.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in net.named_parameters()]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)  # betas too
    for t in range(8):
        train(net, optimizer, 1, start=t)
        scheduler.step()
    assert all(p.isfinite().all() for p in net.parameters())
