"""Reading the mini data: one archive of arrays a workload, checked against its checksum."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from algoperf_shampoo.errors import UserError

SHIPPED = Path(__file__).parent / "data"


def read_arrays(data_dir: str | Path | None, file_name: str, sha256: str) -> dict[str, np.ndarray]:
    """Reads every array of ``file_name``.

    Args:
      data_dir: folder of the file; None means the data shipped with the package.
      sha256: the file's checksum, in hexadecimal.

    Raises:
      UserError: the file is missing, or is not the one the checksum was taken of.
    """
    path = (SHIPPED if data_dir is None else Path(data_dir)) / file_name
    remedy = "restore it from the repository or make it with scripts/data/mini.py"
    if not path.is_file():
        raise UserError(f"{path}: mini data not found; {remedy}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(f"{path}: sha256 is {found}, expected {sha256}; {remedy}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable npz archive ({error}); {remedy}") from error
