"""One battery over all variants: what any torch optimizer must do, and what ours promise
besides."""

import copy
import io
import warnings

import pytest
import torch

from .support import PRECONDITIONED, VARIANTS, blocks_of, gradients, late, limits, make

SHAPES = [(), (1,), (5,), (7, 4), (4, 3, 2, 2), (1, 6, 1), (20, 3)]

pytestmark = pytest.mark.parametrize("variant", VARIANTS)


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [
        torch.nn.Parameter(next(gradients(s, 1, seed=i, dtype=dtype))) for i, s in enumerate(shapes)
    ]


def walk(optimizer, params, steps, start=0, missing=()):
    for t in range(start, start + steps):
        for i, p in enumerate(params):
            gradient = next(gradients(p.shape, 1, seed=1000 * t + i, dtype=p.dtype))
            p.grad = None if (t, i) in missing else gradient
        optimizer.step()


def test_the_same_twice_to_the_bit(variant):
    results = []
    for _ in range(2):
        params = parameters()
        walk(make(variant, params, **limits(variant, max_preconditioner_dim=8)), params, 12)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("done", [1, 7])
def test_state_dict_round_trip_to_the_bit(variant, done):
    params = parameters()
    optimizer = make(variant, params, **limits(variant, max_preconditioner_dim=8))
    walk(optimizer, params, done)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = make(variant, twins, **{**limits(variant, max_preconditioner_dim=8), "lr": 1.0})
    twin.load_state_dict(saved)
    walk(optimizer, params, 15 - done, start=done)
    walk(twin, twins, 15 - done, start=done)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    again = twin.state_dict()["state"]
    for i, entry in optimizer.state_dict()["state"].items():
        first = late(variant) if "0.factor_0" in entry else 0
        assert entry["step"] == again[i]["step"] == 15 - first
        assert entry.keys() == again[i].keys()
        for name, value in entry.items():
            other = again[i][name]
            same = torch.equal(value, other) if torch.is_tensor(value) else value == other
            assert same, name


def test_state_dict_of_another_model_changes_nothing(variant):
    params = parameters(shapes=[(7, 4), (5,)])
    optimizer = make(variant, params)
    walk(optimizer, params, 6)
    before = copy.deepcopy(optimizer.state_dict())
    other_params = parameters(shapes=[(7, 4), (6,)])
    other = make(variant, other_params)
    walk(other, other_params, 3)
    with pytest.raises(ValueError, match="parameter 1"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["state"][0]["step"] == 6 - late(variant)
    x, y = (s["state"][0]["0.exp_avg"] for s in (before, after))
    assert torch.equal(x, y)


def test_bfloat16_parameters_have_float32_state(variant):
    params = parameters(torch.bfloat16)
    optimizer = make(variant, params)
    exact = [torch.nn.Parameter(p.detach().float()) for p in params]
    twin = make(variant, exact)
    for t in range(12):
        for i, (p, q) in enumerate(zip(params, exact, strict=True)):
            p.grad = next(gradients(p.shape, 1, seed=1000 * t + i, dtype=torch.bfloat16))
            q.grad = p.grad.float()
        optimizer.step()
        twin.step()
    for p, q in zip(params, exact, strict=True):
        assert p.dtype == torch.bfloat16
        # 12 updates of 1e-2, each rounded to 8 bits of the parameter
        assert (p.float() - q).abs().max() <= 12 * 2**-8 * max(1.0, q.abs().max().item())
    for entry in optimizer.state_dict()["state"].values():
        tensors = {name: x for name, x in entry.items() if torch.is_tensor(x) and name != "step"}
        assert {x.dtype for x in tensors.values()} == {torch.float32}


def test_parameters_without_gradients_are_skipped_and_count_their_own_steps(variant):
    """A parameter that misses gradients ends as one that was trained alone on those it had."""
    shapes = [(6, 4), (6, 4), (6, 4)]
    missing = {(t, 1) for t in (0, 3, 4, 9)} | {(t, 2) for t in range(30)}
    small = limits(variant, max_preconditioner_dim=8)  # keeps (6, 4) a matrix
    params = parameters(shapes=shapes)
    untouched = params[2].detach().clone()
    optimizer = make(variant, params, **small)
    walk(optimizer, params, 20, missing=missing)
    assert torch.equal(params[2], untouched)
    first = late(variant)
    steps = [optimizer.state_dict()["state"][i]["step"] for i in range(3)]
    assert steps == [20 - first, 16 - first, 0]
    alone = [parameters(shapes=shapes)[1]]
    single = make(variant, alone, **small)
    for t in range(20):
        if (t, 1) not in missing:
            alone[0].grad = next(gradients((6, 4), 1, seed=1000 * t + 1, dtype=torch.float32))
            single.step()
    torch.testing.assert_close(params[1], alone[0], rtol=1e-5, atol=1e-5)


def test_a_convex_problem_is_solved(variant):
    target = next(gradients((6, 5), 1, dtype=torch.float32))
    weight = torch.nn.Parameter(torch.zeros(6, 5))
    # Without grafting a stale root, or one of a null space, takes steps of any length.
    alone = dict(precondition_frequency=1, eps=0.1, betas=(0.5, 0.9))
    own = {} if late(variant) or VARIANTS[variant].grafted else alone
    optimizer = make(variant, [weight], lr=0.05, weight_decay=0.0, **own)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also: the scheduler finds step() wrapped as torch does
        for _ in range(300):
            optimizer.zero_grad()
            loss = (torch.linspace(1, 30, 6)[:, None] * (weight - target) ** 2).sum()
            loss.backward()
            optimizer.step()
            scheduler.step()
    assert loss.item() < 1e-4


def test_channels_last_parameters_and_gradients(variant):
    start = next(gradients((4, 3, 2, 2), 1, dtype=torch.float32))
    plain = torch.nn.Parameter(start.clone())
    permuted = torch.nn.Parameter(start.clone().to(memory_format=torch.channels_last))
    for p in (plain, permuted):
        optimizer = make(variant, [p])
        for t in range(11):
            p.grad = next(gradients(p.shape, 1, seed=t, dtype=torch.float32))
            if p is permuted:
                p.grad = p.grad.to(memory_format=torch.channels_last)
            optimizer.step()
    torch.testing.assert_close(plain, permuted, rtol=1e-6, atol=1e-6)


def test_groups_have_their_own_hyperparameters(variant):
    params = parameters(shapes=[(4, 3), (4, 3)])
    start = params[1].detach().clone()
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.0}]
    optimizer = make(variant, groups)
    walk(optimizer, params, 6)
    assert torch.equal(params[1], start)
    assert not torch.equal(params[0], start)


def test_zero_gradients_and_a_nan_spare_the_rest(variant):
    """All-zero factors survive; one parameter's nan, learnt from, leaves its neighbours alone."""
    params = parameters(shapes=[(6, 4), (6, 4), (6, 4)])
    small = limits(variant, max_preconditioner_dim=8)
    learn = {"nonfinite_gradients": "propagate"}
    optimizer = make(variant, params, weight_decay=0.0, **learn, **small)
    start = params[0].detach().clone()
    for t in range(12):
        for i, p in enumerate(params):
            p.grad = next(gradients(p.shape, 1, seed=10 * t + i, dtype=torch.float32))
        params[0].grad.zero_()
        params[1].grad[0, 0] = torch.nan
        optimizer.step()
    assert torch.equal(params[0], start)
    assert params[2].isfinite().all()
    if variant in PRECONDITIONED:
        zero, nan, good = (blocks_of(optimizer, i)[0] for i in range(3))
        assert nan["failures_0"] == nan["failures_1"] == 2 + late(variant)
        # Of zeros there is a root, and no basis.
        roots = 2 if VARIANTS[variant].rule.roots else 0
        assert zero["refreshes_0"] == zero["refreshes_1"] == roots
        assert good["refreshes_0"] >= 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr", -1.0),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, -0.1)),
        ("eps", -1e-8),
        ("weight_decay", -1),
    ],
)
def test_bad_settings_are_named(variant, setting, value):
    name = "beta" if setting == "betas" else setting
    with pytest.raises(ValueError, match=name):
        make(variant, parameters(), **{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("precondition_frequency", 0),
        ("precondition_frequency", 2.5),
        ("tau", 1.5),
        ("one_dim", "half"),
        ("matmul_precision", "low"),
    ],
)
def test_bad_kronecker_settings_are_named(variant, setting, value):
    if variant not in PRECONDITIONED or setting == "tau":
        variant = "eshampoo_fixed"
    with pytest.raises(ValueError, match=setting):
        make(variant, parameters(), **{setting: value})


def test_step_takes_a_closure_and_leaves_precision_alone(variant):
    before = torch.get_float32_matmul_precision()
    params = parameters(shapes=[(5, 4)])
    optimizer = make(variant, params, **limits(variant, matmul_precision="high"))

    def closure():
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert torch.get_float32_matmul_precision() == before


def test_a_saved_state_holds_the_state_and_nothing_else(variant):
    """Views would drag along what shares their memory, such as the gradient buffer."""
    params = parameters(shapes=[(64, 48), (200,)])
    optimizer = make(variant, params, **limits(variant, max_preconditioner_dim=256))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    entries = (64 * 48 + 200) * (2 if VARIANTS[variant].grafted else 1)  # M and D
    if variant in PRECONDITIONED:
        entries += 2 * (64**2 + 48**2 + 200**2)  # factors and bases, or roots
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert 4 * entries < file.tell() < 4 * entries + 12_000
