"""What a user of torch.optim relies on, in groups, parameters and arguments: the same of ours as of
torch.optim.AdamW, and what ours refuse besides."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import algoperf_shampoo
from algoperf_shampoo.optim import (
    KLSOAP,
    SOAP,
    AdamW,
    EShampoo,
    KLShampoo,
    Shampoo,
    Shampoo2Trace,
    ShampooAdaptive,
    Solver,
)

from .torch_users import OURS, like_torch, model, ours, same, train, weights

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
        (EShampoo, "exponent_multiplier", 0.5, "no option 'exponent_multiplier'"),
        (EShampoo, "grafting_eps", 1e-3, "grafting_eps is one for all groups"),
        (EShampoo, "eigensolver", "warm", "no option 'eigensolver'"),
        (EShampoo, "amsgrad", True, "no option 'amsgrad'"),
        (EShampoo, "rule", "AdamW", "rule is one for all"),
        (EShampoo, "one_dim", "half", "one_dim must be one of 'full', 'adam', 'only', got 'half'"),
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


def test_parameters_that_move_between_steps_are_followed():
    """Their blocks are kept as views, of memory and strides that they may have no more."""

    def trained(moves):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s)) for s in ((20, 9), (6, 5), (4, 3))]
        optimizer = EShampoo(params, precondition_frequency=2, max_preconditioner_dim=8)
        for t in range(9):
            for p in params:
                if moves and t in (3, 6):
                    p.data = p.data.clone() if t == 3 else p.data.mT.contiguous().mT
                p.grad = torch.randn(p.shape)
            optimizer.step()
        return params

    for p, q in zip(trained(True), trained(False), strict=True):
        assert torch.equal(p, q)


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
    first = together.rule.starts
    assert [together.state[p]["step"].item() for p in params] == [9 - first, 8 - first]


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


AS_TORCH = [EShampoo, Shampoo, ShampooAdaptive, Shampoo2Trace, AdamW]


@pytest.mark.parametrize("build", [*AS_TORCH, SOAP, KLShampoo, KLSOAP])
def test_signatures_are_explicit_and_documented(build):
    parameters = inspect.signature(build).parameters
    kinds = {p.kind for p in parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert list(parameters)[:5] == ["params", "lr", "betas", "eps", "weight_decay"]
    theirs = inspect.signature(torch.optim.AdamW).parameters
    for name in ("lr", "betas", "eps", "weight_decay") if build in AS_TORCH else ():
        assert parameters[name].default == theirs[name].default
    documented = "".join(x.__doc__ or "" for x in (build, EShampoo, KLShampoo))
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
    with pytest.raises(ValueError, match="method must be one of eigh, warm, qr, got 'svd'"):
        EShampoo([weight], eigensolver="svd")
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
