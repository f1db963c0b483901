"""The lengths of Shampoo's steps over Adam's, as they are logged."""

from __future__ import annotations

import math

import pytest
import torch

from algoperf_shampoo.harness import step_norms
from algoperf_shampoo.optim import EShampoo, Shampoo
from algoperf_shampoo.submission import _by_kind


def trained(optimizer_class=Shampoo, steps: int = 4, **settings):
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 5), (12, 7), (20, 15), (9,), (9, 8, 7)]
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    options = {"precondition_frequency": 2, "max_preconditioner_dim": 20, **settings}
    optimizer = optimizer_class(params, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer, params


def test_the_ratio_is_what_grafting_divides_by():
    """With a constant gradient M^ is the gradient, and both directions can be had by hand."""
    p = torch.nn.Parameter(torch.zeros(3, 2))
    g = torch.tensor([[1.0, 2.0], [0.5, -1.0], [2.0, 0.25]])
    optimizer = Shampoo([p], precondition_frequency=1, eps=0.0, small_matrices="matrix")
    p.grad = g.clone()
    optimizer.step()
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    shampoo = u @ torch.diag(s**0.0) @ vt  # (GG')^-1/4 G (G'G)^-1/4
    m = 0.1  # 1 - beta1: M before its bias correction, which takes it out of neither norm
    adam = (m * g / ((0.001 * g * g / 0.001).sqrt() + 1e-8)).norm()
    ((shape, ratio),) = optimizer.norm_ratios()
    scale = (0.001**-0.25) ** 2 * 0.001**0.5  # roots of bias-corrected factors
    expected = float(m * shampoo.norm() / adam) * scale
    assert shape == (3, 2) and ratio == pytest.approx(expected, rel=1e-4)


def test_slope_is_of_matrices_alone():
    optimizer, _ = trained()
    ratios = optimizer.norm_ratios()
    assert sorted(len(shape) for shape, _ in ratios) == [1, 2, 2, 2, 3]
    slope = step_norms.slope({"optimizer": optimizer, "scheduler": object()})
    points = [(math.log(math.prod(s)), math.log(r)) for s, r in ratios if len(s) == 2]
    x, y = zip(*points, strict=True)
    mean_x, mean_y = sum(x) / 3, sum(y) / 3
    expected = sum((a - mean_x) * (b - mean_y) for a, b in points)
    assert slope == pytest.approx(expected / sum((a - mean_x) ** 2 for a in x))
    assert slope < 0


def test_optimizers_that_do_not_know_both_have_none():
    assert step_norms.slope({"optimizer": trained(grafting=None)[0]}) is None
    assert step_norms.slope({"optimizer": trained(EShampoo)[0]}) is None
    assert step_norms.slope({"optimizer": trained(steps=1)[0]}) is None  # no roots yet


def test_counts_by_kind_of_factor_are_those_of_all():
    optimizer, _ = trained(EShampoo)
    sets = list(optimizer.factor_sets())
    counts = _by_kind(sets)
    # Two checks; one vector, four blocks with a first and a last dimension, one with a middle one.
    assert counts["eigenbasis_checks_one_dim"] == 2
    assert counts["eigenbasis_checks_left"] == counts["eigenbasis_checks_right"] == 8
    assert sum(sum(s.checks) for s in sets) == 2 + 8 + 8 + 2
