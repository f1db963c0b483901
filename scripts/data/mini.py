"""Makes the mini data of the three workloads from public packages (a build-time tool).

Nobody needs to run this to train: the files it writes ship with the package. It is kept so that
every byte of them can be traced and made again. It needs ``numpy``, ``nibabel`` and ``rdkit``, so
use an environment of its own:

    pip download --no-deps pycortex==1.2.12          # sdist: one subject's T1 head
    pip download --no-deps nilearn==0.14.1           # wheel: average of 152 heads
    pip download --no-deps MoleculeACE==3.0.0        # wheel: 30 bioactivity tables
    apt-get install mricron-data dataset-fashion-mnist
    python -m venv minidata && minidata/bin/pip install numpy nibabel rdkit

    minidata/bin/python scripts/data/mini.py \\
        --pycortex pycortex-1.2.12.tar.gz --nilearn nilearn-0.14.1-py3-none-any.whl \\
        --moleculeace MoleculeACE-3.0.0-py3-none-any.whl --out algoperf_shampoo/workloads/data

Prints the SHA-256 of each file; ``workloads_config/*.json`` holds the same sums, checked at every
load. Same packages, same bytes: arrays are in a fixed order and the archive carries no time stamps.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

PYCORTEX_HEAD = "pycortex-1.2.12/filestore/db/S1/anatomicals/raw.nii.gz"
NILEARN_HEAD = "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
MOLECULEACE_TABLES = "MoleculeACE/Data/benchmark_data/"

FIELD_OF_VIEW = 128  # pixels of 2 mm
FOREGROUND = 20  # grey level above which a voxel is head, not air
MIN_FOREGROUND_FRACTION = 0.10  # of the field of view, for a slice to be kept
SPLITS = ("train", "validation", "test")

# The value lists of OGB's molecule featuriser: a feature is the value's position in its list.
CHIRALITY = (
    "CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "CHI_OTHER",
)  # fmt: skip
HYBRIDIZATION = ("SP", "SP2", "SP3", "SP3D", "SP3D2")
BOND_TYPE = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
BOND_STEREO = ("STEREONONE", "STEREOZ", "STEREOE", "STEREOCIS", "STEREOTRANS", "STEREOANY")
MAX_ATOMS = 64  # heavier molecules (peptides, 1% of all) are left out: they would dominate a batch
DECOY_SEED = 20
VALIDATION_FROM, TEST_FROM = 0.90, 0.95  # bounds on the molecule's hash, as a fraction of 2**64


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays as a compressed npz whose bytes depend on the arrays alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, buffer.getvalue(), compresslevel=9)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path.name}: {path.stat().st_size} bytes, sha256 {digest}")


def read_head(nifti_gz: bytes) -> np.ndarray:
    """Returns a head volume, axes right, anterior, superior, as float32 grey levels."""
    import nibabel  # type: ignore[import-not-found]

    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(nifti_gz))
    volume = np.asanyarray(nibabel.as_closest_canonical(image).dataobj)
    return volume.astype(np.float32)


def centred(plane: np.ndarray, size: int, centre: tuple[int, int]) -> np.ndarray:
    """Cuts a [size, size] window around ``centre`` out of every slice [N, H, W]; air outside."""
    padded = np.pad(plane, ((0, 0), (size // 2, size // 2), (size // 2, size // 2)))
    top, left = centre
    return padded[:, top : top + size, left : left + size]


def head_slices(volume: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Axial, coronal and sagittal slices of a 1 mm head, 2 mm pixels.

    Returns uint8 images [N, 128, 128] and each one's orientation [N] (0 axial, 1 coronal,
    2 sagittal). Every ``step``-th slice (mm) with at least 10% foreground is kept.
    """
    images, orientations = [], []
    foreground = volume > FOREGROUND
    for orientation, axis in enumerate((2, 1, 0)):
        # Rows run from superior (or anterior) downwards, as images are looked at.
        slices = np.moveaxis(volume, axis, 0).transpose(0, 2, 1)[:, ::-1, :]
        mask = np.moveaxis(foreground, axis, 0).transpose(0, 2, 1)[:, ::-1, :]
        where = np.argwhere(mask.mean(axis=0) > 0.02)
        low, high = where.min(axis=0), where.max(axis=0)
        centre = int(low[0] + high[0]) // 2, int(low[1] + high[1]) // 2
        full = 2 * FIELD_OF_VIEW
        slices, mask = centred(slices, full, centre), centred(mask, full, centre)
        kept = np.flatnonzero(mask.mean(axis=(1, 2)) >= MIN_FOREGROUND_FRACTION)[::step]
        tiles = slices[kept].reshape(len(kept), FIELD_OF_VIEW, 2, FIELD_OF_VIEW, 2)
        pooled = tiles.mean(axis=(2, 4))
        images.append(np.clip(np.rint(pooled), 0, 255).astype(np.uint8))
        orientations.append(np.full(len(kept), orientation, np.uint8))
    return np.concatenate(images), np.concatenate(orientations)


def make_fastmri(pycortex: Path, nilearn: Path, colin27: Path, out: Path) -> None:
    """Heads: pycortex S1 trains, Colin27 validates, MNI152 tests."""
    with tarfile.open(pycortex) as sdist:
        member = sdist.extractfile(PYCORTEX_HEAD)
        if member is None:
            raise FileNotFoundError(f"{pycortex}: no {PYCORTEX_HEAD}")
        train_head = read_head(member.read())
    validation_head = read_head(colin27.read_bytes())
    with zipfile.ZipFile(nilearn) as wheel:
        test_head = read_head(wheel.read(NILEARN_HEAD))
    arrays = {}
    for split, head, step in (
        ("train", train_head, 1),
        ("validation", validation_head, 5),
        ("test", test_head, 5),
    ):
        arrays[f"{split}_images"], arrays[f"{split}_orientations"] = head_slices(head, step)
        print(f"  {split}: {arrays[f'{split}_images'].shape}")
    arrays["heads"] = np.array(["pycortex S1", "Colin27 (ch2)", "MNI ICBM152 2009a"])
    write_npz(out / "fastmri_mini.npz", arrays)


def read_idx(path: Path) -> np.ndarray:
    """Reads an unsigned-byte IDX file (Fashion-MNIST's format)."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def make_imagenet_vit(folder: Path, out: Path, sizes: tuple[int, int, int]) -> None:
    """Train and validation are the first images of the training files, test of the test files."""
    train_images = read_idx(folder / "train-images-idx3-ubyte.gz")
    train_labels = read_idx(folder / "train-labels-idx1-ubyte.gz")
    test_images = read_idx(folder / "t10k-images-idx3-ubyte.gz")
    test_labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    n_train, n_validation, n_test = sizes
    both = n_train + n_validation
    write_npz(
        out / "imagenet_vit_mini.npz",
        {
            "train_images": train_images[:n_train],
            "train_labels": train_labels[:n_train],
            "validation_images": train_images[n_train:both],
            "validation_labels": train_labels[n_train:both],
            "test_images": test_images[:n_test],
            "test_labels": test_labels[:n_test],
        },
    )


def position(values: tuple[str, ...], value: str) -> int:
    """OGB's rule: an unknown value takes the place after the last."""
    return values.index(value) if value in values else len(values)


def atom_features(atom: Any) -> list[int]:
    """OGB's nine: number, chirality, degree, charge, Hs, radicals, hybrid, aromatic, ring."""
    return [
        atom.GetAtomicNum() - 1,
        position(CHIRALITY, str(atom.GetChiralTag())),
        atom.GetTotalDegree(),
        atom.GetFormalCharge() + 5,
        atom.GetTotalNumHs(),
        atom.GetNumRadicalElectrons(),
        position(HYBRIDIZATION, str(atom.GetHybridization())),
        int(atom.GetIsAromatic()),
        int(atom.IsInRing()),
    ]


def bond_features(bond: Any) -> list[int]:
    """OGB's three: type, stereo, conjugated."""
    return [
        position(BOND_TYPE, str(bond.GetBondType())),
        position(BOND_STEREO, str(bond.GetStereo())),
        int(bond.GetIsConjugated()),
    ]


def read_ligands(wheel: Path) -> tuple[list[str], dict[str, set[int]]]:
    """Returns the targets and, per canonical SMILES, on which of them it was measured."""
    from rdkit import Chem  # type: ignore[import-not-found]

    measured: dict[str, set[int]] = {}
    with zipfile.ZipFile(wheel) as archive:
        tables = sorted(
            n for n in archive.namelist() if n.startswith(MOLECULEACE_TABLES) and n.endswith(".csv")
        )
        for task, name in enumerate(tables):
            rows = csv.DictReader(io.TextIOWrapper(archive.open(name), encoding="utf-8"))
            for row in rows:
                smiles = Chem.CanonSmiles(row["smiles"])
                measured.setdefault(smiles, set()).add(task)
    return [Path(n).stem for n in tables], measured


def draw_labels(ligand_of: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Labels int8 [molecules, tasks]: 1 a ligand of the target, 0 a decoy, -1 missing.

    The tables hold measured ligands only, so a task's negatives are decoys: about as many molecules
    as it has ligands, drawn among those measured on other targets alone. A molecule with a
    stereoisomer among the ligands is never a decoy.

    Args:
      ligand_of: bool [molecules, tasks], measured on the target.
      keys: uint64 [molecules], equal for stereoisomers.
    """
    _, group = np.unique(keys, return_inverse=True)
    group_ligand_of = np.zeros((group.max() + 1, ligand_of.shape[1]), bool)
    np.logical_or.at(group_ligand_of, group, ligand_of)
    free = ~group_ligand_of[group]
    wanted = ligand_of.sum(axis=0) / free.sum(axis=0)
    draws = np.random.Generator(np.random.PCG64(DECOY_SEED)).random(ligand_of.shape)
    labels = np.full(ligand_of.shape, -1, np.int8)
    labels[free & (draws < wanted)] = 0
    labels[ligand_of] = 1
    return labels


def make_ogbg(wheel: Path, out: Path) -> None:
    """Molecules as graphs, one bit per target: is it one of the target's ligands?

    A molecule's split is decided by the SHA-256 of its SMILES without stereochemistry, so
    stereoisomers, whose graphs hardly differ, are never on both sides of a split.
    """
    from rdkit import Chem

    tasks, measured = read_ligands(wheel)
    nodes: list[list[int]] = []
    bonds: list[list[int]] = []
    ends: list[tuple[int, int]] = []
    ligand_of: list[list[int]] = []
    n_nodes: list[int] = []
    n_bonds: list[int] = []
    keys: list[int] = []
    for smiles in sorted(measured):
        molecule = Chem.MolFromSmiles(smiles)
        if molecule.GetNumAtoms() > MAX_ATOMS:
            continue
        flat = Chem.MolToSmiles(molecule, isomericSmiles=False)
        keys.append(int.from_bytes(hashlib.sha256(flat.encode()).digest()[:8], "big"))
        nodes.extend(atom_features(a) for a in molecule.GetAtoms())
        for bond in molecule.GetBonds():
            bonds.append(bond_features(bond))
            ends.append((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()))
        n_nodes.append(molecule.GetNumAtoms())
        n_bonds.append(molecule.GetNumBonds())
        ligand_of.append([int(task in measured[smiles]) for task in range(len(tasks))])
    fractions = np.array(keys, np.float64) / 2.0**64
    splits = (fractions >= VALIDATION_FROM).astype(np.uint8) + (fractions >= TEST_FROM)
    arrays: dict[str, np.ndarray] = {
        # Feature-major: long runs of one feature compress better.
        "node_features": np.array(nodes, np.uint8).T,
        "bond_features": np.array(bonds, np.uint8).T,
        "bond_ends": np.array(ends, np.uint8).T,
        "num_nodes": np.array(n_nodes, np.uint8),
        "num_bonds": np.array(n_bonds, np.uint8),
        "labels": draw_labels(np.array(ligand_of, bool), np.array(keys, np.uint64)),
        "molecule_keys": np.array(keys, np.uint64),
        "splits": splits,
        "tasks": np.array(tasks),
    }
    left_out = len(measured) - len(n_nodes)
    print(f"  left out: {left_out} of {len(measured)} molecules, over {MAX_ATOMS} atoms")
    for index, split in enumerate(SPLITS):
        print(f"  {split}: {np.count_nonzero(splits == index)} molecules")
    write_npz(out / "ogbg_mini.npz", arrays)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pycortex", type=Path, help="pycortex-1.2.12.tar.gz")
    parser.add_argument("--nilearn", type=Path, help="nilearn-0.14.1-py3-none-any.whl")
    parser.add_argument("--moleculeace", type=Path, help="MoleculeACE-3.0.0-py3-none-any.whl")
    parser.add_argument(
        "--colin27", type=Path, default=Path("/usr/share/mricron/templates/ch2.nii.gz")
    )
    parser.add_argument(
        "--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist")
    )
    parser.add_argument("--images", type=int, nargs=3, default=(12_000, 2_000, 2_000))
    parser.add_argument("--only", choices=("fastmri", "imagenet_vit", "ogbg"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    needed = {
        "fastmri": [
            ("--pycortex", args.pycortex),
            ("--nilearn", args.nilearn),
            ("--colin27", args.colin27),
        ],
        "imagenet_vit": [("--fashion-mnist", args.fashion_mnist)],
        "ogbg": [("--moleculeace", args.moleculeace)],
    }
    wanted = [args.only] if args.only else list(needed)
    for workload in wanted:
        for flag, path in needed[workload]:
            if path is None or not path.exists():
                print(f"error: {flag}: {path} not found (see --help)", file=sys.stderr)
                return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if "fastmri" in wanted:
        make_fastmri(args.pycortex, args.nilearn, args.colin27, args.out)
    if "imagenet_vit" in wanted:
        make_imagenet_vit(args.fashion_mnist, args.out, tuple(args.images))
    if "ogbg" in wanted:
        make_ogbg(args.moleculeace, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
