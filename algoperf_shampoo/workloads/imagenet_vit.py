"""ImageNet ViT: a vision transformer of the S/16 family. Cross entropy, accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algoperf_shampoo.contract import LossType
from algoperf_shampoo.workloads import metrics
from algoperf_shampoo.workloads.base import Batch, Workload
from algoperf_shampoo.workloads.config import Schema
from algoperf_shampoo.workloads.data import read_arrays
from algoperf_shampoo.workloads.models import ViT
from algoperf_shampoo.workloads.queues import MakeBatch, generator

FULL_IMAGE_SIZE = 224
MINI_IMAGE_SIZE = 28
# Grey levels of Fashion-MNIST's training images.
MINI_MEAN, MINI_STD = 0.2860 * 255, 0.3530 * 255
FULL_MIXUP_ALPHA = 0.2


class ImagenetViT(Workload):
    """Mini: Fashion-MNIST, ten classes, one channel, 28 x 28, in place of ImageNet.

    Normalised by the training images' mean and standard deviation, as ImageNet is. No augmentation
    and no mixup (AlgoPerf crops at random, flips, applies RandAugment and mixes).
    """

    full_name = "imagenet_vit"
    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    model_schema = {
        "num_classes": int,
        "in_channels": int,
        "patch_size": int,
        "width": int,
        "depth": int,
        "mlp_dim": int,
        "num_heads": int,
    }
    data_schema: ClassVar[Schema] = {}

    def _check(self) -> None:
        model = self.config.model
        if self._image_size % model["patch_size"]:
            raise self._complain(
                "model.patch_size", model["patch_size"], f"it must divide {self._image_size}"
            )
        if model["width"] % model["num_heads"]:
            raise self._complain(
                "model.num_heads", model["num_heads"], f"it must divide width {model['width']}"
            )
        if model["width"] % 4 or model["width"] < 8:
            raise self._complain(
                "model.width", model["width"], "it must be a multiple of 4, from 8"
            )

    @property
    def _image_size(self) -> int:
        return MINI_IMAGE_SIZE if self.is_mini else FULL_IMAGE_SIZE

    def _new_model(self) -> nn.Module:
        return ViT(**self.config.model)

    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> Tensor:
        """Logits [B, classes] from the batch's "inputs" [B, channels, H, W]."""
        return model(batch["inputs"], dropout_rate=dropout_rate)

    def loss_fn(
        self,
        label_batch: Tensor,
        logits_batch: Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """Cross entropy of each example [B], against classes int64 [B] or weights [B, classes].

        Label smoothing s replaces the target t by (1 - s) t + s / classes.
        """
        losses = F.cross_entropy(
            logits_batch, label_batch, reduction="none", label_smoothing=label_smoothing
        )
        return self._masked(losses, mask_batch)

    def _open_split(
        self, split: str, data_dir: str | Path | None, data_rng: Any
    ) -> tuple[int, MakeBatch]:
        del data_rng
        settings = self.config.data
        assert settings is not None
        arrays = read_arrays(data_dir, settings["file"], settings["sha256"])
        source = "train" if split == "eval_train" else split
        images = torch.from_numpy(arrays[f"{source}_images"]).unsqueeze(1).to(self.device)
        labels = torch.from_numpy(arrays[f"{source}_labels"]).long().to(self.device)
        channels = self.config.model["in_channels"]

        def make_batch(indices: np.ndarray, draw: int) -> Batch:
            del draw  # no augmentation
            chosen = torch.from_numpy(indices).to(self.device)
            inputs = (images[chosen].float() - MINI_MEAN) / MINI_STD
            return {"inputs": inputs.expand(-1, channels, -1, -1), "targets": labels[chosen]}

        return self._check_count(source, len(images)), make_batch

    def _evaluate(self, model: nn.Module, batches: list[Batch], rng: Any) -> dict[str, float]:
        def score(logits: Tensor, batch: Batch) -> Tensor:
            return metrics.top_1_accuracy(logits, batch["targets"])

        return self._mean_over_examples(model, batches, score, rng)

    def synthetic_batch(self, batch_size: int, rng: Any) -> Batch:
        """Full-size targets are mixed pairs of classes [B, classes], as from AlgoPerf's mixup."""
        source = self._torch_generator(rng)
        classes, channels = self.config.model["num_classes"], self.config.model["in_channels"]
        size = self._image_size
        inputs = torch.randn((batch_size, channels, size, size), generator=source)
        targets = torch.randint(classes, (batch_size,), generator=source)
        if not self.is_mini:
            one_hot = F.one_hot(targets, classes).float()
            weight = generator(rng, 1).beta(FULL_MIXUP_ALPHA, FULL_MIXUP_ALPHA)
            inputs = weight * inputs + (1 - weight) * inputs.roll(1, dims=0)
            targets = weight * one_hot + (1 - weight) * one_hot.roll(1, dims=0)
        return {"inputs": inputs.to(self.device), "targets": targets.to(self.device)}
