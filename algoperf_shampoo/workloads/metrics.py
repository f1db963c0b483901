"""The metrics of the three workloads, as AlgoPerf defines them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 7
K1, K2 = 0.01, 0.03


def where_finite(score: Tensor, outputs: Tensor) -> Tensor:
    """``score`` [B], floats, but NaN for examples whose ``outputs`` [B, ...] hold inf or NaN."""
    finite = torch.isfinite(outputs).flatten(start_dim=1).all(dim=1)
    return torch.where(finite, score, torch.nan)


def _window_mean(images: Tensor) -> Tensor:
    """Mean over every 7x7 window that lies inside the image: [B, H, W] -> [B, H - 6, W - 6]."""
    columns = F.avg_pool2d(images.unsqueeze(1), (WINDOW, 1), stride=1)
    return F.avg_pool2d(columns, (1, WINDOW), stride=1).squeeze(1)


def ssim(outputs: Tensor, targets: Tensor, mean: Tensor, std: Tensor, volume_max: Tensor) -> Tensor:
    """Structural similarity of each image, averaged over its windows.

    SSIM = (2 ux uy + c1) (2 vxy + c2) / ((ux^2 + uy^2 + c1) (vx + vy + c2)), with uniform 7x7
    windows, sample (co)variances, c1 = (0.01 L)^2, c2 = (0.03 L)^2 and L the volume's maximum
    (Wang et al. 2004; fastMRI, Zbontar et al. 2018). Windows that cross an edge do not count.

    Args:
      outputs, targets: [B, H, W] normalised images, H and W at least 7.
      mean, std: [B], undo the normalisation: image * std + mean.
      volume_max: [B], L; 0 (a padded example) is read as 1.

    Returns:
      [B], in [-1, 1]; NaN for an image with an output that is not finite.
    """
    x = outputs * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    y = targets * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    data_range = torch.where(volume_max == 0, torch.ones_like(volume_max), volume_max)
    c1 = ((K1 * data_range) ** 2).view(-1, 1, 1)
    c2 = ((K2 * data_range) ** 2).view(-1, 1, 1)
    ux, uy = _window_mean(x), _window_mean(y)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    vx = sample * (_window_mean(x * x) - ux * ux)
    vy = sample * (_window_mean(y * y) - uy * uy)
    vxy = sample * (_window_mean(x * y) - ux * uy)
    similarity = (2 * ux * uy + c1) * (2 * vxy + c2)
    similarity = similarity / ((ux * ux + uy * uy + c1) * (vx + vy + c2))
    return where_finite(similarity.mean(dim=(1, 2)).clamp(-1.0, 1.0), outputs)


def top_1_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest logit of each example is its label's, 1 or 0.

    Args:
      logits: [B, classes].
      labels: [B], integers.

    Returns:
      [B]; NaN for an example with a logit that is not finite.
    """
    return where_finite((logits.argmax(dim=1) == labels).float(), logits)


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve as a step function: sum_n (R_n - R_{n-1}) P_n.

    Thresholds are the distinct scores, so examples with equal scores enter together.

    Args:
      labels: [N] of 0 and 1, at least one of them 1.
      scores: [N], higher means more likely 1.

    Returns:
      NaN when a score is not finite: NaN has no place in an order.
    """
    if not np.isfinite(scores).all():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order] == 1)  # positives among the first k + 1
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = hits[last_of_ties]
    precision = found / (last_of_ties + 1)
    return float(np.sum(np.diff(found, prepend=0) * precision) / hits[-1])


def mean_average_precision(labels: np.ndarray, logits: np.ndarray, mask: np.ndarray) -> float:
    """Mean of the tasks' average precisions, over the tasks that have both classes.

    OGB's and AlgoPerf's definition, with one difference: a task's classes are counted among its
    known labels only (AlgoPerf counts a missing label, filled with 0, as a negative there).

    Args:
      labels, logits, mask: [N, tasks]; mask is false where a label is missing.

    Returns:
      NaN when no task has both classes, or a logit with a known label is not finite.
    """
    known = mask.astype(bool)
    if not np.isfinite(logits[known]).all():
        return float("nan")
    precisions = []
    for task in range(labels.shape[1]):
        truth = labels[known[:, task], task]
        if np.any(truth == 0) and np.any(truth == 1):
            precisions.append(average_precision(truth, logits[known[:, task], task]))
    return float(np.mean(precisions)) if precisions else float("nan")
