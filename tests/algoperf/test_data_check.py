"""The check of a data folder, on good ones and on ones broken in one place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.algoperf import data_check, minidata

JPEG = b"\xff\xd8\xff\xe0 and so on"
OGBG = {"train": 5, "validation": 2, "test": 2}
IMAGENET = {"classes": 2, "train_images": 4, "val_images": 2, "test_images": 3}
FASTMRI = {
    "train_files": 2,
    "val_files": 102,
    "train_slices": 4,
    "validation_slices": 100,
    "test_slices": 2,
}


def tfds(root: Path, name: str, version: str, splits: dict[str, int], shards: int = 1) -> Path:
    """What tensorflow-datasets leaves: an index, and records of 10 bytes each with their frames."""
    folder = root / name / version
    folder.mkdir(parents=True)
    short = name.split("/")[0]
    entries = []
    for split, count in splits.items():
        lengths = [count // shards + (i < count % shards) for i in range(shards)]
        for shard, length in enumerate(lengths):
            path = folder / f"{short}-{split}.tfrecord-{shard:05d}-of-{shards:05d}"
            path.write_bytes(b"0" * 26 * length)
        entries.append(
            {"name": split, "numBytes": str(10 * count), "shardLengths": [str(n) for n in lengths]}
        )
    (folder / "dataset_info.json").write_text(json.dumps({"name": short, "splits": entries}))
    (folder / "features.json").write_text("{}")
    return folder


@pytest.fixture
def ogbg(tmp_path: Path) -> Path:
    tfds(tmp_path, "ogbg_molpcba", "0.1.3", OGBG, shards=2)
    return tmp_path


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for split, count in (("train", 2), ("val", 1)):
        for name in ("n01", "n02"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / name / f"{i}.JPEG").write_bytes(JPEG)
    tfds(tmp_path, "imagenet_v2/matched-frequency", "3.0.0", {"test": 3})
    return tmp_path


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("h5py")
    root = tmp_path_factory.mktemp("fastmri")
    for name, count, slices in (("train", 2, 2), ("val", 102, 1)):
        (root / f"knee_singlecoil_{name}").mkdir()
        for i in range(count):
            volume(root / f"knee_singlecoil_{name}" / f"file{i:03d}.h5", slices)
    return root


def volume(path: Path, slices: int, rows: int = 640, side: int = 320, top: bool = True) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        options = {"compression": "gzip"}
        file.create_dataset("kspace", (slices, rows, 322), np.complex64, **options)
        file.create_dataset("reconstruction_esc", (slices, side, side), np.float32, **options)
        if top:
            file.attrs["max"] = 1.0


def test_good_folders_pass(ogbg: Path, volumes: Path) -> None:
    """No error: what fails is below."""
    data_check.check("ogbg", ogbg, OGBG)
    data_check.check("fastmri", volumes, FASTMRI)


def test_good_images_pass(imagenet: Path) -> None:
    """No error: what fails is below."""
    data_check.check("imagenet_vit", imagenet, IMAGENET)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "ogbg_molpcba-train.tfrecord-00001-of-00002").unlink(), "missing or empty"),
        (lambda d: (d / "ogbg_molpcba-test.tfrecord-00000-of-00002").write_bytes(b"x"), "bytes"),
        (lambda d: (d / "features.json").unlink(), "features.json: missing"),
        (lambda d: (d / "dataset_info.json").write_text("{"), "not an index"),
        (lambda d: d.rename(d.with_name("0.1.2")), "version 0.1.2 is there instead"),
    ],
)
def test_broken_ogbg(ogbg: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(ogbg / "ogbg_molpcba" / "0.1.3")
    with pytest.raises(UserError, match=words) as caught:
        data_check.check("ogbg", ogbg, OGBG)
    assert "\n" not in str(caught.value)


def test_wrong_count_names_both(ogbg: Path) -> None:
    with pytest.raises(UserError, match="5 train examples, expected 350,343"):
        data_check.check("ogbg", ogbg)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "val/n02").rename(d / "val/n03"), "'n02' is in one of train and val only"),
        (lambda d: (d / "train/n01/0.JPEG").unlink(), "3 images, expected 4"),
        (lambda d: [p.unlink() for p in (d / "val/n01").iterdir()], "no image"),
        (lambda d: [p.write_bytes(b"") for p in (d / "val/n01").iterdir()], "not a JPEG"),
        (lambda d: (d / "train/n03").mkdir(), "3 class folders, expected 2"),
        (lambda d: (d / "imagenet_v2").rename(d / "v2"), "no imagenet_v2"),
    ],
)
def test_broken_imagenet(imagenet: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(imagenet)
    with pytest.raises(UserError, match=words):
        data_check.check("imagenet_vit", imagenet, IMAGENET)


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("a", lambda p: p.write_bytes(b"not hdf5"), "not a readable HDF5"),
        ("b", lambda p: volume(p, 2, rows=512), r"kspace is \(2, 512, 322\)"),
        ("c", lambda p: volume(p, 2, side=300), "reconstruction_esc is"),
        ("d", lambda p: volume(p, 2, top=False), "attribute 'max'"),
        ("e", lambda p: volume(p, 3), "5 train slices, expected 4"),
    ],
)
def test_broken_fastmri(
    volumes: Path, tmp_path: Path, name: str, spoil: Callable[[Path], object], words: str
) -> None:
    train, val = (tmp_path / f"knee_singlecoil_{split}" for split in ("train", "val"))
    train.mkdir()
    val.symlink_to(volumes / val.name)
    for path in (volumes / train.name).iterdir():
        (train / path.name).write_bytes(path.read_bytes())
    spoil(train / "file001.h5")
    with pytest.raises(UserError, match=words):
        data_check.check("fastmri", tmp_path, FASTMRI)


def test_data_dir_may_be_the_root_or_the_part(ogbg: Path, tmp_path_factory: Path) -> None:
    assert data_check.locate("ogbg", ogbg) == ogbg
    parent = ogbg / "all"
    (parent / "ogbg" / "ogbg_molpcba").mkdir(parents=True)
    assert data_check.locate("ogbg", parent) == (parent / "ogbg").resolve()


@pytest.mark.parametrize("text", ["{", "[]", '{"workloads": {"ogbg": {"folder": "x"}}}'])
def test_bad_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / minidata.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=minidata.MANIFEST):
        minidata.read(tmp_path, "ogbg_minidata")
    with pytest.raises(UserError, match="make data-algoperf-mini"):
        minidata.read(tmp_path.parent / "elsewhere", "ogbg_minidata")
