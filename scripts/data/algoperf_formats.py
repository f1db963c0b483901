"""Write the suite's real mini data in the formats that AlgoPerf's input pipelines read.

The images and molecules are those of the embedded minis (``workloads_config/*.json`` names their
files and checksums, ``scripts/data/mini.py`` their sources). What is changed is the form:

* FastMRI: a 128 x 128 slice is interpolated in Fourier space to the 320 x 320 field of view, put
  into the middle of 640 x 368, and its centred orthonormal 2-D DFT is the k-space. It is rounded
  to 16 bits of its largest entry, as a scanner's converter would, which also makes it compress.
* ImageNet ViT: 28 x 28 grey images as 224 x 224 RGB JPEG files in class folders; the test split as
  ``imagenet_v2/matched-frequency`` of tensorflow-datasets.
* OGBG: molecules as ``ogbg_molpcba`` of tensorflow-datasets; the 30 tasks there are fill the first
  of its 128 columns, the others are missing labels.
* MNIST: the same grey images as ``mnist`` of tensorflow-datasets, repeated up to the 60,000 and
  10,000 that AlgoPerf insists on; a smoke test, not a benchmark.

Needs h5py, pillow and tensorflow-datasets: AlgoPerf's own environment has them.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.algoperf.minidata import MANIFEST
from algoperf_shampoo.workloads.data import SHIPPED

WORKLOADS = ("fastmri", "imagenet_vit", "ogbg", "mnist")
ROWS, COLUMNS, SIDE = 640, 368, 320
SCALE = 1e-4 / 255  # the real reconstruction_esc are of the order of 1e-4
TASKS = 128
MNIST_TRAIN, MNIST_TEST = 60_000, 10_000

# Shared by the three: 60 steps under a cosine schedule that outlasts them (0.6 of the step hint).
_RUN = {
    "step_hint": 120,
    "max_allowed_runtime_sec": 3600,
    "eval_period_time_sec": 60,
    # No target has been measured for these runs: they end at max_global_steps.
    "validation_target_value": 9.0,
    "test_target_value": 9.0,
}
MAX_GLOBAL_STEPS = 60


@dataclass(frozen=True)
class Amounts:
    """How much of the shipped data is written. FastMRI counts slices, the others examples."""

    fastmri: tuple[int, int, int] = (96, 100, 16)
    imagenet_vit: tuple[int, int, int] = (2000, 400, 400)
    ogbg: tuple[int, int, int] = (6000, 800, 800)
    slices_per_volume: int = 16


def make(out: Path, workloads: tuple[str, ...] = WORKLOADS, amounts: Amounts | None = None) -> None:
    """Write the data sets and the manifest into ``out``; what is there already is kept.

    Raises:
        UserError: ``out`` holds something else, or a package is missing.
    """
    amounts = amounts or Amounts()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _manifest(out))):
        raise UserError(f"{out}: not empty, and without {MANIFEST}; name another folder")
    _need("h5py", "PIL", "tensorflow_datasets")
    out.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[Path, Amounts], dict[str, Any]]] = {
        "fastmri": _fastmri,
        "imagenet_vit": _imagenet_vit,
        "ogbg": _ogbg,
        "mnist": _mnist,
    }
    entries = _manifest(out)
    for name in workloads:
        if name in entries:
            print(f"{name}: already in {out}", flush=True)
            continue
        entries[name] = makers[name](out, amounts)
        text = json.dumps({"workloads": entries}, indent=1) + "\n"
        (out / MANIFEST).write_text(text, encoding="utf-8")
        print(f"{name}: written to {out / entries[name]['folder']}", flush=True)


def kspace_of(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Simulated single-coil acquisition of one magnitude image.

    Args:
        image: [H, W] grey levels, 0 to 255, with air at the borders; H and W even, at most 320.

    Returns:
        k-space [640, 368] complex64 and target [320, 320] float32: the inverse transform of the
        k-space, cropped, as AlgoPerf's pipeline computes it from full sampling.
    """
    spectrum = np.fft.fftshift(np.fft.fft2(image.astype(np.float64)))
    pads = [((SIDE - size) // 2, (SIDE - size + 1) // 2) for size in image.shape]
    larger = np.fft.ifft2(np.fft.ifftshift(np.pad(spectrum, pads))).real
    larger *= SIDE * SIDE / image.size
    canvas = np.zeros((ROWS, COLUMNS))
    top, left = (ROWS - SIDE) // 2, (COLUMNS - SIDE) // 2
    canvas[top : top + SIDE, left : left + SIDE] = larger.clip(min=0) * SCALE
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(canvas), norm="ortho"))
    unit = np.abs(kspace).max() / 2**15
    kspace = (np.round(kspace / unit) * unit).astype(np.complex64)
    seen = np.abs(np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace), norm="ortho")))
    return kspace, seen[top : top + SIDE, left : left + SIDE].astype(np.float32)


def _fastmri(out: Path, amounts: Amounts) -> dict[str, Any]:
    arrays = _shipped("fastmri")
    train, validation, test = amounts.fastmri
    if validation != 100:
        raise UserError("fastmri: AlgoPerf takes the first 100 files as validation: make 100")
    folders = {name: out / "fastmri" / f"knee_singlecoil_{name}" for name in ("train", "val")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    per = amounts.slices_per_volume
    picked = _spread(arrays["train_images"], train)
    volumes = [picked[start : start + per] for start in range(0, train, per)]
    for number, volume in enumerate(volumes):
        _volume(folders["train"] / f"file{1_000_001 + number}.h5", volume)
    held_out = [("validation", validation), ("test", test)]
    images = [_spread(arrays[f"{split}_images"], count) for split, count in held_out]
    for number, image in enumerate(np.concatenate(images)):
        _volume(folders["val"] / f"file{1_000_000 + number}.h5", image[None])
    return {
        "folder": "fastmri",
        "global_batch_size": 4,
        "max_global_steps": MAX_GLOBAL_STEPS,
        "on_disk": {
            "train_files": len(volumes),
            "val_files": validation + test,
            "train_slices": train,
            "validation_slices": validation,
            "test_slices": test,
        },
        "properties": _properties(train, 16, 16, min(16, test), eval_batch=8),
    }


def _volume(path: Path, images: np.ndarray) -> None:
    import h5py

    slices = [kspace_of(image) for image in images]
    target = np.stack([seen for _, seen in slices])
    with h5py.File(path, "w") as file:
        options = {"compression": "gzip", "compression_opts": 4, "shuffle": True}
        kspace = np.stack([k for k, _ in slices])
        file.create_dataset("kspace", data=kspace, chunks=(1, ROWS, COLUMNS), **options)
        file.create_dataset("reconstruction_esc", data=target, chunks=(1, SIDE, SIDE), **options)
        file.attrs["max"] = float(target.max())


def _imagenet_vit(out: Path, amounts: Amounts) -> dict[str, Any]:
    arrays = _shipped("imagenet_vit")
    folder = out / "imagenet" / "pytorch"
    train, validation, test = amounts.imagenet_vit
    classes = int(arrays["train_labels"].max()) + 1
    for split, source, count in (("train", "train", train), ("val", "validation", validation)):
        for name in range(classes):
            (folder / split / f"n{name:08d}").mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, label = arrays[f"{source}_images"][number], arrays[f"{source}_labels"][number]
            path = folder / split / f"n{label:08d}" / f"{split}_{number:06d}.JPEG"
            path.write_bytes(_jpeg(image))

    def examples() -> Iterator[tuple[str, dict[str, Any]]]:
        for number in range(test):
            label = int(arrays["test_labels"][number])
            image = io.BytesIO(_jpeg(arrays["test_images"][number]))
            name = f"{label}/{number:06d}.jpeg"
            yield name, {"image": image, "label": label, "file_name": name}

    _tfds(folder, "imagenet_v2", {"test": examples}, "3.0.0", config="matched-frequency")
    return {
        "folder": "imagenet/pytorch",
        "global_batch_size": 16,
        "max_global_steps": MAX_GLOBAL_STEPS,
        "on_disk": {
            "classes": classes,
            "train_images": train,
            "val_images": validation,
            "test_images": test,
        },
        "properties": _properties(train, 128, 128, 128, eval_batch=64),
    }


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    picture = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _ogbg(out: Path, amounts: Amounts) -> dict[str, Any]:
    arrays = _shipped("ogbg")
    nodes, bonds, ends = (arrays[n].T for n in ("node_features", "bond_features", "bond_ends"))
    node_end = np.cumsum(arrays["num_nodes"], dtype=np.int64)
    bond_end = np.cumsum(arrays["num_bonds"], dtype=np.int64)
    indices: dict[str, np.ndarray] = {}
    for code, split in enumerate(("train", "validation", "test")):
        # Molecules without a bond would be graphs without edges, of which the real set has none.
        own = np.flatnonzero((arrays["splits"] == code) & (arrays["num_bonds"] > 0))
        indices[split] = _spread(own, amounts.ogbg[code])

    def examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in indices[split]:
            n, m = int(arrays["num_nodes"][i]), int(arrays["num_bonds"][i])
            labels = np.full(TASKS, np.nan, np.float32)
            known = arrays["labels"][i] >= 0
            labels[: len(known)][known] = arrays["labels"][i][known]
            yield (
                int(i),
                {
                    "labels": labels,
                    "num_nodes": np.array([n]),
                    "num_edges": np.array([m]),
                    "node_feat": nodes[node_end[i] - n : node_end[i]].astype(np.float32),
                    "edge_feat": bonds[bond_end[i] - m : bond_end[i]].astype(np.float32),
                    "edge_index": ends[bond_end[i] - m : bond_end[i]].astype(np.int64),
                },
            )

    splits: dict[str, Callable[[], Iterator[Any]]] = {
        split: functools.partial(examples, split) for split in indices
    }
    _tfds(out / "ogbg", "ogbg_molpcba", splits, "0.1.3")
    counts = {split: len(own) for split, own in indices.items()}
    return {
        "folder": "ogbg",
        "global_batch_size": 64,
        "max_global_steps": MAX_GLOBAL_STEPS,
        "on_disk": counts,
        "properties": _properties(counts["train"], 512, 512, 512, eval_batch=256),
    }


def _mnist(out: Path, amounts: Amounts) -> dict[str, Any]:
    del amounts
    arrays = _shipped("imagenet_vit")

    def examples(source: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        images, labels = arrays[f"{source}_images"], arrays[f"{source}_labels"]
        for number in range(count):
            i = number % len(images)
            yield number, {"image": images[i][..., None], "label": int(labels[i])}

    _tfds(
        out,
        "mnist",
        {
            "train": lambda: examples("train", MNIST_TRAIN),
            "test": lambda: examples("test", MNIST_TEST),
        },
        None,
    )
    return {"folder": ".", "on_disk": {"train": MNIST_TRAIN, "test": MNIST_TEST}}


def _tfds(
    folder: Path,
    name: str,
    splits: dict[str, Callable[[], Iterator[Any]]],
    version: str | None,
    config: str | None = None,
) -> None:
    """Write a data set with the builder that will read it, its download replaced by ``splits``."""
    import tensorflow_datasets as tfds

    options: dict[str, Any] = {"config": config} if config else {}
    if version is not None:
        options["version"] = version
    builder = tfds.builder_cls(name)(data_dir=str(folder), **options)
    builder._split_generators = lambda *_: {split: examples() for split, examples in splits.items()}
    tfds.disable_progress_bar()
    builder.download_and_prepare()


def _properties(
    train: int, eval_train: int, validation: int, test: int, eval_batch: int
) -> dict[str, Any]:
    return {
        "num_train_examples": train,
        # Fewer than there are: an evaluation should take seconds on a laptop too.
        "num_eval_train_examples": eval_train,
        "num_validation_examples": validation,
        "num_test_examples": test,
        "eval_batch_size": eval_batch,
        **_RUN,
    }


def _spread(items: np.ndarray, count: int) -> np.ndarray:
    """``count`` items, evenly spread over all of them."""
    if count > len(items):
        raise UserError(f"{count} asked for, the shipped mini data has {len(items)}")
    return items[np.linspace(0, len(items) - 1, count).round().astype(int)]


def _shipped(workload: str) -> dict[str, np.ndarray]:
    with np.load(SHIPPED / f"{workload}_mini.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _manifest(out: Path) -> dict[str, Any]:
    try:
        return json.loads((out / MANIFEST).read_text(encoding="utf-8"))["workloads"]
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{out / MANIFEST}: not readable ({error}); remove the folder") from None


def _need(*modules: str) -> None:
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        from algoperf_shampoo.harness.algoperf.env import HOW_TO_INSTALL

        raise UserError(f"no {', '.join(missing)} here: {HOW_TO_INSTALL}")
