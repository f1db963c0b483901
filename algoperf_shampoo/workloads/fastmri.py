"""FastMRI: a U-Net reconstructs under-sampled magnetic resonance images. L1 loss, SSIM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algoperf_shampoo.contract import LossType
from algoperf_shampoo.workloads import metrics
from algoperf_shampoo.workloads.base import Batch, Workload
from algoperf_shampoo.workloads.data import read_arrays
from algoperf_shampoo.workloads.models import UNet
from algoperf_shampoo.workloads.queues import MakeBatch, generator

FULL_IMAGE_SIZE = 320
CENTER_FRACTION = 0.08
ACCELERATION = 4
CLIP = 6.0  # in standard deviations
EVAL_SEED = (0, 0)
# Purposes for which numbers are drawn from the data's random state, beside the order.
MASK_STREAM, MIRROR_STREAM = 1, 2


def sampling_masks(num_masks: int, num_columns: int, rng: Any, draw: int = 0) -> Tensor:
    """Which k-space columns are measured, float32 [num_masks, num_columns] of 0 and 1.

    fastMRI's random mask: the central 8% of the columns always, each other one with the probability
    that brings the expected total to a quarter.
    """
    num_low = int(num_columns * CENTER_FRACTION)
    probability = (num_columns / ACCELERATION - num_low) / (num_columns - num_low)
    draws = generator(rng, MASK_STREAM, draw).random((num_masks, num_columns))
    masks = draws < probability
    start = (num_columns - num_low + 1) // 2
    masks[:, start : start + num_low] = True
    return torch.from_numpy(masks.astype(np.float32))


def undersample(images: Tensor, masks: Tensor) -> Tensor:
    """Magnitude of the zero-filled reconstruction of masked k-space.

    Args:
      images: float32 [N, H, W] magnitudes; k-space is their centred Fourier transform.
      masks: [N or 1, W].

    Returns:
      float32 [N, H, W].
    """
    axes = (-2, -1)
    kspace = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(images, axes)), axes)
    masked = torch.fft.ifftshift(kspace * masks.unsqueeze(-2), axes)
    return torch.fft.fftshift(torch.fft.ifft2(masked), axes).abs()


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The central [N, size, size] of [N, H, W]."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def largest_values(images: Tensor, volumes: Tensor) -> Tensor:
    """The largest value in each image's volume, [N]; ``volumes`` int64 [N] says which that is."""
    largest = torch.zeros(int(volumes.max()) + 1)
    largest.scatter_reduce_(0, volumes, images.amax(dim=(1, 2)), "amax")
    return largest[volumes]


def make_examples(images: Tensor, volume_max: Tensor, masks: Tensor, size: int) -> Batch:
    """Inputs, targets and what undoes their normalisation, as AlgoPerf's pipeline makes them.

    Input and target are shifted and scaled by the input's own mean and standard deviation and
    clipped at six.

    Args:
      images: float32 [N, H, W] magnitudes over the whole field of view.
      volume_max: float32 [N], handed through: the metric's data range.
      masks: [N or 1, W], see ``sampling_masks``.
      size: side of the central crop that is learnt.
    """
    inputs = centre_crop(undersample(images, masks), size)
    targets = centre_crop(images, size)
    mean = inputs.mean(dim=(1, 2))
    std = inputs.std(dim=(1, 2), correction=0)
    shift, scale = mean.view(-1, 1, 1), std.view(-1, 1, 1)
    return {
        "inputs": ((inputs - shift) / scale).clamp(-CLIP, CLIP),
        "targets": ((targets - shift) / scale).clamp(-CLIP, CLIP),
        "mean": mean,
        "std": std,
        "volume_max": volume_max,
    }


class FastMRI(Workload):
    """Mini: slices of one head train, another head validates, a third tests.

    What differs from fastMRI's knees: k-space is simulated from magnitude images of heads (no
    phase, no noise of its own) at 128 x 128, 2 mm, in three orientations, and the central crop is
    64 x 64 instead of 320 x 320. Training draws a new mask, and whether to mirror the slice, each
    time a slice comes up: AlgoPerf's 34,742 slices keep theirs, a few hundred of one head would be
    learnt by heart. Evaluations use one fixed mask (in AlgoPerf those on validation and test).
    """

    full_name = "fastmri"
    loss_type = LossType.MEAN_ABSOLUTE_ERROR
    model_schema = {"num_channels": int, "num_pool_layers": int}
    data_schema = {"crop": int}

    def _check(self) -> None:
        levels = self.config.model["num_pool_layers"]
        if self._image_size < 2 ** (levels + 1):
            raise self._complain(
                "model.num_pool_layers", levels, f"too many for images of {self._image_size} pixels"
            )

    @property
    def _image_size(self) -> int:
        return self.config.data["crop"] if self.config.data else FULL_IMAGE_SIZE

    def _new_model(self) -> nn.Module:
        return UNet(**self.config.model)

    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> Tensor:
        """Images [B, H, W] from the batch's "inputs" [B, H, W]."""
        return model(batch["inputs"].unsqueeze(1), dropout_rate=dropout_rate).squeeze(1)

    def loss_fn(
        self,
        label_batch: Tensor,
        logits_batch: Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """Mean absolute error of each image [B]; label smoothing is ignored, as in AlgoPerf."""
        del label_smoothing
        losses = F.l1_loss(logits_batch, label_batch, reduction="none").mean(dim=(1, 2))
        return self._masked(losses, mask_batch)

    def _open_split(
        self, split: str, data_dir: str | Path | None, data_rng: Any
    ) -> tuple[int, MakeBatch]:
        settings = self.config.data
        assert settings is not None
        arrays = read_arrays(data_dir, settings["file"], settings["sha256"])
        source = "train" if split == "eval_train" else split
        images = torch.from_numpy(arrays[f"{source}_images"]).float()
        volumes = torch.from_numpy(arrays[f"{source}_orientations"]).long()
        count = self._check_count(source, len(images))
        if self._image_size > images.shape[-1]:
            raise self._complain(
                "data.crop", self._image_size, f"the slices have {images.shape[-1]} pixels"
            )
        largest = largest_values(centre_crop(images, self._image_size), volumes)
        images, largest = images.to(self.device), largest.to(self.device)
        fixed = sampling_masks(1, images.shape[-1], EVAL_SEED).to(self.device)

        def make_batch(indices: np.ndarray, draw: int) -> Batch:
            chosen = torch.from_numpy(indices).to(self.device)
            slices, masks = images[chosen], fixed
            if split == "train":
                masks = sampling_masks(len(chosen), images.shape[-1], data_rng, draw)
                masks = masks.to(self.device)
                mirrored = generator(data_rng, MIRROR_STREAM, draw).random(len(chosen)) < 0.5
                which = torch.from_numpy(mirrored).to(self.device).view(-1, 1, 1)
                slices = torch.where(which, slices.flip(-1), slices)
            return make_examples(slices, largest[chosen], masks, self._image_size)

        return count, make_batch

    def _evaluate(self, model: nn.Module, batches: list[Batch], rng: Any) -> dict[str, float]:
        def score(outputs: Tensor, batch: Batch) -> Tensor:
            return metrics.ssim(
                outputs, batch["targets"], batch["mean"], batch["std"], batch["volume_max"]
            )

        return self._mean_over_examples(model, batches, score, rng)

    def synthetic_batch(self, batch_size: int, rng: Any) -> Batch:
        source = self._torch_generator(rng)
        shape = (batch_size, self._image_size, self._image_size)
        targets = torch.randn(shape, generator=source)
        inputs = targets + 0.5 * torch.randn(shape, generator=source)
        batch = {
            "inputs": inputs.clamp(-CLIP, CLIP),
            "targets": targets.clamp(-CLIP, CLIP),
            "mean": torch.full((batch_size,), 1e-4),
            "std": torch.full((batch_size,), 1e-4),
            "volume_max": torch.full((batch_size,), 1e-3),
        }
        return {key: value.to(self.device) for key, value in batch.items()}
