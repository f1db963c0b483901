"""Look at a data folder before a run: files, counts, shapes and dataset versions, in seconds.

AlgoPerf itself finds out when its input pipeline gets there: at the first validation for a missing
split, never for a truncated one (its counts are constants, and iterators repeat).

Standard library only, except that FastMRI's volumes are opened with h5py where it is installed; run
as ``python -m algoperf_shampoo.harness.algoperf.data_check WORKLOAD FOLDER`` in AlgoPerf's Python.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from algoperf_shampoo.errors import UserError

FULL: dict[str, dict[str, int]] = {
    "fastmri": {
        "train_files": 973,
        "val_files": 199,
        "train_slices": 34_742,
        "validation_slices": 3_554,  # of the first 100 validation files, sorted
        "test_slices": 3_581,  # of the others
    },
    "imagenet_vit": {
        "classes": 1_000,
        "train_images": 1_281_167,
        "val_images": 50_000,
        "test_images": 10_000,
    },
    "ogbg": {"train": 350_343, "validation": 43_793, "test": 43_793},
}
# Where AlgoPerf's dataset_setup.py puts a workload's data below --data_dir, and what is in it.
_FOLDERS = {
    "fastmri": (("fastmri", "."), "knee_singlecoil_train"),
    "imagenet_vit": (("imagenet/pytorch", "imagenet", "."), "train"),
    "ogbg": (("ogbg", "."), "ogbg_molpcba"),
}
_HOW = {
    "fastmri": "datasets/dataset_setup.py --fastmri of AlgoPerf prepares it",
    "imagenet_vit": "datasets/dataset_setup.py --imagenet --framework=pytorch of AlgoPerf "
    "prepares it",
    "ogbg": "datasets/dataset_setup.py --ogbg of AlgoPerf prepares it",
}
_MINI = "`make data-algoperf-mini` makes a small one"
_FIRST_TEST_FILE = 100
_ROWS, _SIDE = 640, 320
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_IMAGE_STARTS = (b"\xff\xd8", b"\x89PNG")  # one file of ImageNet is a PNG under a JPEG's name
_V2 = ("imagenet_v2/matched-frequency", "3.0.0")
_TFRECORD_FRAME = 16  # length, its checksum and the checksum of the data, bytes a record
_OGBG = ("ogbg_molpcba", "0.1.3")


def locate(workload: str, data_dir: Path) -> Path:
    """The folder to give as ``--data_dir``: ``data_dir`` itself or its part for this workload.

    Raises:
        UserError: neither holds such data.
    """
    folders, inside = _FOLDERS[workload]
    for name in folders:
        if (data_dir / name / inside).is_dir():
            return (data_dir / name).resolve() if name != "." else data_dir
    places = ", ".join(str(Path(name) / inside) for name in folders)
    raise UserError(
        f"DATA_DIR={data_dir}: no {workload} data (looked for {places}); {_HOW[workload]}; {_MINI}"
    )


def usual(workload: str, data_dir: Path) -> Path:
    """Where AlgoPerf's set-up puts this workload's data, whether it is there or not."""
    folders, _ = _FOLDERS[workload]
    return data_dir / next((name for name in folders if name != "."), ".")


def locate_imagenet_v2(folder: Path) -> Path:
    """The folder for ``--imagenet_v2_data_dir``: of the images, or one of the two above it."""
    tried = (folder, folder.parent, folder.parent.parent)
    for candidate in tried:
        if (candidate / _V2[0]).is_dir():
            return candidate
    raise UserError(
        f"{folder}: no {_V2[0]}, which the test split needs, there or in the two folders above; "
        "datasets/dataset_setup.py --imagenet of AlgoPerf prepares it"
    )


def check(workload: str, folder: Path, expected: Mapping[str, int] | None = None) -> None:
    """Check the data of one workload; ``expected`` are other counts than :data:`FULL`'s.

    Raises:
        UserError: naming the first file or count that is wrong.
    """
    counts = FULL[workload] if expected is None else expected
    _CHECKS[workload](folder, counts)


def _fastmri(folder: Path, expected: Mapping[str, int]) -> None:
    files = {}
    for split, name in (("train", "knee_singlecoil_train"), ("val", "knee_singlecoil_val")):
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name}: no such folder; {_HOW['fastmri']}")
        files[split] = sorted((folder / name).glob("*.h5"))
        _same(folder / name, f"{split} files (*.h5)", len(files[split]), expected[f"{split}_files"])
    if len(files["val"]) <= _FIRST_TEST_FILE:
        raise UserError(
            f"{folder / 'knee_singlecoil_val'}: {len(files['val'])} files; the test split is what "
            f"follows the first {_FIRST_TEST_FILE}"
        )
    parts = {
        "train_slices": files["train"],
        "validation_slices": files["val"][:_FIRST_TEST_FILE],
        "test_slices": files["val"][_FIRST_TEST_FILE:],
    }
    for key, paths in parts.items():
        slices = [_volume(path) for path in paths]
        if None not in slices:
            _same(paths[0].parent, key.replace("_", " "), sum(filter(None, slices)), expected[key])


def _volume(path: Path) -> int | None:
    """Slices in one volume; None without h5py, when only the signature can be looked at."""
    try:
        import h5py
    except ModuleNotFoundError:
        with path.open("rb") as file:
            if file.read(8) != b"\x89HDF\r\n\x1a\n":
                raise UserError(f"{path}: not an HDF5 file; download it again") from None
        return None
    try:
        with h5py.File(path, "r") as volume:
            shapes = {}
            for name, kind in (("kspace", "complex64"), ("reconstruction_esc", "float32")):
                if name not in volume:
                    raise UserError(f"{path}: no dataset {name!r}; download it again")
                if volume[name].dtype != kind:
                    raise UserError(f"{path}: {name} is {volume[name].dtype}, expected {kind}")
                shapes[name] = volume[name].shape
            if "max" not in volume.attrs:
                raise UserError(f"{path}: no attribute 'max', without which SSIM is meaningless")
    except OSError as error:
        raise UserError(f"{path}: not a readable HDF5 file ({error}); download it again") from None
    kspace, target = shapes["kspace"], shapes["reconstruction_esc"]
    if len(kspace) != 3 or kspace[1] != _ROWS or kspace[2] < _SIDE:
        raise UserError(f"{path}: kspace is {kspace}, expected [slices, {_ROWS}, {_SIDE} or more]")
    if target != (kspace[0], _SIDE, _SIDE):
        raise UserError(
            f"{path}: reconstruction_esc is {target}, expected {(kspace[0], _SIDE, _SIDE)}"
        )
    return int(kspace[0])


def _imagenet(folder: Path, expected: Mapping[str, int]) -> None:
    classes = {}
    for split in ("train", "val"):
        root = folder / split
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; {_HOW['imagenet_vit']}")
        classes[split] = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        _same(root, "class folders", len(classes[split]), expected["classes"])
        images = sum(_class_images(root / name) for name in classes[split])
        _same(root, "images", images, expected[f"{split}_images"])
    odd = sorted(set(classes["train"]) ^ set(classes["val"]))
    if odd:
        # ImageFolder numbers the sorted names, so every later class would get another label.
        raise UserError(f"{folder}: class folder {odd[0]!r} is in one of train and val only")
    v2 = locate_imagenet_v2(folder)
    _tfds(v2, *_V2, {"test": expected["test_images"]}, _HOW["imagenet_vit"])


def _class_images(folder: Path) -> int:
    count = 0
    for entry in os.scandir(folder):
        if not entry.name.lower().endswith(_IMAGE_ENDINGS):
            continue
        if not count:  # one image a class is opened
            with open(entry.path, "rb") as file:
                start = file.read(4)
            if not start.startswith(_IMAGE_STARTS):
                raise UserError(f"{entry.path}: not a JPEG image ({len(start)} bytes read)")
        count += 1
    if not count:
        raise UserError(f"{folder}: no image, and torchvision's ImageFolder needs one a class")
    return count


def _ogbg(folder: Path, expected: Mapping[str, int]) -> None:
    _tfds(folder, *_OGBG, dict(expected), _HOW["ogbg"])


def _tfds(root: Path, name: str, version: str, expected: dict[str, int], how: str) -> None:
    """Check a data set that tensorflow-datasets has prepared, from its own index."""
    folder = root / name / version
    index = folder / "dataset_info.json"
    if not index.is_file():
        others = sorted(p.parent.name for p in (root / name).glob("*/dataset_info.json"))
        instead = f"version {others[0]} is there instead" if others else "nothing prepared there"
        raise UserError(f"{folder}: AlgoPerf reads version {version}; {instead}; {how}")
    if not (folder / "features.json").is_file():
        raise UserError(f"{folder / 'features.json'}: missing; {how}")
    try:
        info = json.loads(index.read_text(encoding="utf-8"))
        splits = {split["name"]: split for split in info["splits"]}
        lengths = {
            split: [int(n) for n in entry["shardLengths"]] for split, entry in splits.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{index}: not an index of tensorflow-datasets ({error}); {how}") from None
    for split, count in expected.items():
        if split not in splits:
            raise UserError(f"{index}: no split {split!r}; {how}")
        _same(folder, f"{split} examples", sum(lengths[split]), count)
        total = len(lengths[split])
        for shard in range(total):
            prefix = f"{info.get('name', name)}-{split}.tfrecord"
            path = folder / f"{prefix}-{shard:05d}-of-{total:05d}"
            if not path.is_file() or (lengths[split][shard] and not path.stat().st_size):
                raise UserError(f"{path}: missing or empty; {how}")
    _same_bytes(folder, info, splits, expected)


def _same_bytes(
    folder: Path, info: Mapping[str, Any], splits: Mapping[str, Any], expected: Mapping[str, int]
) -> None:
    """Shards of a split are together as long as the index says, with the framing of records."""
    for split in expected:
        examples = sum(int(n) for n in splits[split]["shardLengths"])
        stated = int(splits[split].get("numBytes", 0)) + _TFRECORD_FRAME * examples
        paths = folder.glob(f"{info.get('name', '')}-{split}.tfrecord-*")
        found = sum(path.stat().st_size for path in paths)
        if found < stated:
            raise UserError(f"{folder}: {split} is {found:,} bytes, its index says {stated:,}")


def _same(where: Path, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise UserError(f"{where}: {found:,} {what}, expected {expected:,}")


_CHECKS: dict[str, Callable[[Path, Mapping[str, int]], None]] = {
    "fastmri": _fastmri,
    "imagenet_vit": _imagenet,
    "ogbg": _ogbg,
}


def main(arguments: list[str]) -> int:
    """``WORKLOAD FOLDER [COUNTS_AS_JSON]``; prints ``ok`` or the error."""
    workload, folder = arguments[0], Path(arguments[1])
    expected = json.loads(arguments[2]) if len(arguments) > 2 else None
    try:
        check(workload, folder, expected)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
