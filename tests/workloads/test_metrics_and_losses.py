"""Metrics against independent oracles; losses, masks and label smoothing by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algoperf_shampoo import workloads
from algoperf_shampoo.workloads import metrics


def slow_ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    """Window by window, in float64."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(x.shape[0] - 6):
        for j in range(x.shape[1] - 6):
            a, b = x[i : i + 7, j : j + 7].ravel(), y[i : i + 7, j : j + 7].ravel()
            cov = np.cov(a, b)  # divides by 48
            top = (2 * a.mean() * b.mean() + c1) * (2 * cov[0, 1] + c2)
            bottom = (a.mean() ** 2 + b.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)
            values.append(top / bottom)
    return float(np.mean(values))


def test_ssim_against_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=(3, 15, 12))
    x = y + 0.4 * rng.normal(size=y.shape)
    mean, std, largest = rng.uniform(1, 2, 3), rng.uniform(0.5, 1, 3), np.array([3.0, 5.0, 0.0])
    tensors = [torch.tensor(a) for a in (x, y, mean, std, largest)]
    found = metrics.ssim(*tensors)
    for k in range(3):
        a, b = x[k] * std[k] + mean[k], y[k] * std[k] + mean[k]
        assert found[k].item() == pytest.approx(slow_ssim(a, b, largest[k] or 1.0), abs=1e-9)


def test_ssim_of_equal_images_is_one() -> None:
    x = torch.randn(2, 9, 9)
    one = torch.ones(2)
    torch.testing.assert_close(metrics.ssim(x, x, 0 * one, one, one), one)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_average_precision_against_sklearn(data: st.DataObject) -> None:
    average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score
    n = data.draw(st.integers(1, 30))
    labels = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    scores = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n)), float)
    labels[data.draw(st.integers(0, n - 1))] = 1
    found = metrics.average_precision(labels, scores)
    assert found == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


def test_mean_average_precision_by_hand() -> None:
    labels = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 1, 0]], float)
    logits = np.array([[4.0, 1.0, 1.0], [3.0, 1.0, 5.0], [2.0, 1.0, 3.0], [9.0, 1.0, 2.0]])
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 1, 1]], bool)
    # Task 0: order 1, 0, 1 -> (1 + 2/3) / 2. Task 1: no negatives. Task 2: the positive is first.
    expected = ((1 + 2 / 3) / 2 + 1.0) / 2
    assert metrics.mean_average_precision(labels, logits, mask) == pytest.approx(expected)
    assert math.isnan(metrics.mean_average_precision(labels, logits, np.zeros_like(mask)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_metrics_of_outputs_that_are_not_finite_are_nan(bad: float) -> None:
    images, one = torch.rand(3, 9, 9), torch.ones(3)
    images[1, 4, 4] = bad
    found = metrics.ssim(images, torch.rand(3, 9, 9), 0 * one, one, one)
    assert found.isnan().tolist() == [False, True, False]
    logits = torch.tensor([[2.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    logits[1, 1] = bad
    found = metrics.top_1_accuracy(logits, torch.tensor([0, 0, 0]))
    assert found[[0, 2]].tolist() == [1.0, 0.0] and found[1].isnan()
    labels, scores = np.array([1.0, 0.0, 1.0]), np.array([1.0, bad, 2.0])
    assert math.isnan(metrics.average_precision(labels, scores))
    two, known = np.stack([labels, labels], 1), np.ones((3, 2), bool)
    scores = np.array([[1.0, 1.0], [0.0, bad], [2.0, 2.0]])
    assert math.isnan(metrics.mean_average_precision(two, scores, known))
    known[1, 1] = False  # nobody knows that label: the prediction does not count
    assert metrics.mean_average_precision(two, scores, known) == 1.0


@pytest.mark.parametrize("name", ["fastmri_mini", "imagenet_vit_mini", "ogbg_mini"])
def test_one_weight_that_is_nan_makes_every_metric_and_loss_nan(name: str) -> None:
    workload = workloads.load(name)
    rng = np.array([1, 2], dtype=np.uint32)
    model, _ = workload.init_model_fn(rng)
    before = workload.eval_model(workload.eval_batch_size, model, None, rng, None, None, 0)
    assert all(math.isfinite(value) for value in before.values())
    with torch.no_grad():
        list(model.parameters())[-1].view(-1)[0] = math.nan
    after = workload.eval_model(workload.eval_batch_size, model, None, rng, None, None, 0)
    counts = [key for key in after if key.endswith("/num_examples")]
    assert all(after[key] == before[key] for key in counts)
    assert all(math.isnan(value) for key, value in after.items() if key not in counts)
    assert not workload.has_reached_validation_target(after)


def test_fastmri_loss_by_hand() -> None:
    workload = workloads.load("fastmri_mini")
    targets = torch.zeros(3, 2, 2)
    outputs = torch.tensor([1.0, -2.0, 5.0]).view(3, 1, 1).expand(3, 2, 2)
    found = workload.loss_fn(targets, outputs, torch.tensor([1.0, 1.0, 0.0]), 0.3)
    assert found["per_example"].tolist() == [1.0, 2.0, 0.0]
    assert found["summed"].item() == 3.0
    assert found["n_valid_examples"].item() == 2
    assert workload.loss_fn(targets, outputs)["n_valid_examples"].item() == 3


def test_vit_loss_by_hand() -> None:
    workload = workloads.load("imagenet_vit_mini")
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    targets = torch.tensor([1, 0])
    found = workload.loss_fn(targets, logits, torch.tensor([1.0, 0.0]))
    assert found["per_example"].tolist() == pytest.approx([-math.log(0.75), 0.0])
    assert found["n_valid_examples"].item() == 1
    smooth = workload.loss_fn(targets, logits, label_smoothing=0.2)["per_example"]
    expected = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))  # (1 - s) t + s / 2
    assert smooth.tolist() == pytest.approx([expected, math.log(2.0)])
    mixed = workload.loss_fn(torch.tensor([[0.25, 0.75], [1.0, 0.0]]), logits)["per_example"]
    assert mixed[0].item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


def test_ogbg_loss_by_hand() -> None:
    workload = workloads.load("ogbg_mini")
    logits = torch.tensor([[0.0, 2.0], [-1.0, 3.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [float("nan"), 1.0]])
    mask = torch.tensor([[True, True], [False, True]])
    found = workload.loss_fn(labels, logits, mask)
    expected = [[math.log(2), math.log1p(math.exp(2))], [0.0, math.log1p(math.exp(-3))]]
    torch.testing.assert_close(found["per_example"], torch.tensor(expected))
    assert found["n_valid_examples"].item() == 3
    found["summed"].backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert logits.grad[1, 0] == 0
    # Two tasks, so smoothing 0.2 turns 1 into 0.8 + 0.1 and 0 into 0.1.
    smooth = workload.loss_fn(labels, logits, mask, label_smoothing=0.2)["per_example"]
    assert smooth[1, 1].item() == pytest.approx(math.log1p(math.exp(3)) - 0.9 * 3, abs=1e-6)
    with pytest.raises(ValueError, match="differ in shape"):
        workload.loss_fn(labels, logits, mask[:1])


@pytest.mark.parametrize("name", workloads.names())
def test_a_hit_is_at_or_above_the_target(name: str) -> None:
    workload = workloads.load(name)
    metric = workload.target_metric_name
    for split, target, reached in (
        ("validation", workload.validation_target_value, workload.has_reached_validation_target),
        ("test", workload.test_target_value, workload.has_reached_test_target),
    ):
        assert reached({f"{split}/{metric}": target})
        assert not reached({f"{split}/{metric}": target - 1e-6})
        assert not reached({f"{split}/{metric}": float("nan")})
