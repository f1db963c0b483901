"""The runs of a study of claims as one file, a tar in xz that is the same for the same runs.

A mini's run is 22 KB of text in seven small files, and a study has hundreds of runs: as text they
are four times as large. What is kept of a run is its record and the files that the record has
digests of (:mod:`..harness.seal`); the curves for TensorBoard follow from them.

Members are named ``LABEL/study_SEED/WORKLOAD_pytorch/trial_1/FILE``, in the order of their names,
without times, owners or modes. They are read here one by one instead of by ``extractall``, whose
safe filter Python 3.11 has from 3.11.4 on: a member that is no plain file, or whose name leads out
of the folder, is refused. This module needs the standard library alone.
"""

from __future__ import annotations

import io
import lzma
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk, seal

SUFFIX = ".tar.xz"
_PRESET = 6  # of xz: 9 gains nothing here
_RECORD = "run.json"
MAX_BYTES = 1 << 30
"""Of an archive's content: more than fifty times that of the largest committed one."""


@dataclass(frozen=True)
class Unpacked:
    """An archive, and the folder that its runs lie in for now."""

    archive: Path
    folder: Path

    def name(self, path: Path) -> str | None:
        """A folder's path in the archive; None if it does not lie there."""
        inside = path.is_relative_to(self.folder)
        return path.relative_to(self.folder).as_posix() if inside else None


def pack(archive: Path, folder: Path, trials: Sequence[Path]) -> None:
    """Write the runs ``trials``, folders below ``folder``, into one file, whole or not at all.

    Raises:
        UserError: one cannot be read, or the archive cannot be written.
    """
    paths = [trial / name for trial in trials for name in (*sorted(seal.present(trial)), _RECORD)]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(paths, key=lambda path: path.relative_to(folder).as_posix()):
            with disk.explained(path):
                data = path.read_bytes()
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    disk.write_atomically(archive, lzma.compress(content.getvalue(), preset=_PRESET))


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of an archive below ``folder``, which is there and empty.

    Raises:
        UserError: there is no such file, it is damaged or none of ours, or the disk is full; files
            that were written by then stay.
    """
    for name, data in members(archive):
        path = folder / name
        with disk.explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The files of an archive, each by its path in it.

    The whole is decompressed first, so that xz's check sums are asked before anything is used.

    Raises:
        UserError: there is no such file, or it is damaged or none of ours.
    """
    with disk.explained(archive):
        packed = archive.read_bytes()
    seen: set[str] = set()
    try:
        content = _decompressed(archive, packed)
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                data = _content(archive, tar, member)
                if member.name in seen:  # of two, nothing says which is the run's
                    raise _damaged(archive, f"{member.name!r} is there twice")
                seen.add(member.name)
                yield member.name, data
            rest = content[tar.offset :]
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError, OverflowError) as error:
        raise _damaged(archive, str(error)) from error
    if rest.strip(b"\0"):  # tarfile takes a header that is none for the end
        raise _damaged(archive, f"no member begins at byte {len(content) - len(rest)}")


def _damaged(archive: Path, why: str) -> UserError:
    return UserError(f"{archive}: damaged, or no tar in xz: {why}")


def _decompressed(archive: Path, packed: bytes) -> bytes:
    """The one stream of xz that a file is, of at most :data:`MAX_BYTES`."""
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    content = stream.decompress(packed, MAX_BYTES)
    if not stream.eof:
        more = len(content) == MAX_BYTES
        raise _damaged(archive, f"more than {MAX_BYTES} bytes" if more else "it is cut short")
    if stream.unused_data:
        raise _damaged(archive, f"{len(stream.unused_data)} bytes after its end")
    return content


def _content(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    path = PurePosixPath(member.name)
    plain = path.as_posix() == member.name and member.name.isprintable()  # one name for one file
    leads_out = path.is_absolute() or ".." in path.parts or "\\" in member.name
    stream = tar.extractfile(member) if member.isreg() and plain and not leads_out else None
    if stream is None:
        raise UserError(f"{archive}: {member.name!r} is no plain file of a run's folder")
    return stream.read()


@contextmanager
def unpacked(archive: Path) -> Iterator[Unpacked]:
    """The runs of an archive in a folder that is removed afterwards.

    Raises:
        UserError: as :func:`unpack`.
    """
    with TemporaryDirectory(prefix="claims-runs-") as name:
        folder = Path(os.path.realpath(name))
        unpack(archive, folder)
        yield Unpacked(archive, folder)
