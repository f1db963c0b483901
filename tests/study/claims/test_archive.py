"""Archives of runs: the same bytes for the same runs, all that was in them back, and one line for
what is damaged or leads elsewhere."""

from __future__ import annotations

import io
import lzma
import random
import tarfile
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study.claims import archive

FILES = {
    "run.json": b'{"format": 1}\n',
    "hparams.json": b"{}\n",
    "step_losses.csv": b"global_step,loss\n" + b"".join(b"%d,0.5\n" % i for i in range(500)),
}
TRIALS = [
    f"{label}/study_{seed}/ogbg_mini_pytorch/trial_1"
    for label in ("nadamw_allsteps", "a" * 130)  # longer than the name of a plain tar's member
    for seed in (1, 2)
]


def folders(root: Path, backwards: bool = False) -> list[Path]:
    """Runs, each with files that are not of its record: a checkpoint, curves, a lock."""
    trials = [root / trial for trial in (reversed(TRIALS) if backwards else TRIALS)]
    for trial in trials:
        trial.mkdir(parents=True)
        for name in reversed(FILES) if backwards else FILES:
            (trial / name).write_bytes(FILES[name])
        for name in ("checkpoint_500", "events.out.tfevents.1.curves", ".lock"):
            (trial / name).write_bytes(b"large")
    return trials


def packed(tmp_path: Path) -> Path:
    path = tmp_path / "runs.tar.xz"
    archive.pack(path, tmp_path / "runs", folders(tmp_path / "runs"))
    return path


def written(tmp_path: Path, *members: tuple[tarfile.TarInfo, bytes], after: bytes = b"") -> Path:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        end = tar.offset
    path = tmp_path / "theirs.tar.xz"
    path.write_bytes(lzma.compress(content.getvalue()[:end] + after + bytes(1024)))
    return path


def test_the_same_runs_give_the_same_bytes(tmp_path):
    first = packed(tmp_path / "one").read_bytes()
    later = folders(tmp_path / "two" / "runs", backwards=True)
    for trial in later:
        (trial / "run.json").chmod(0o600)
    archive.pack(tmp_path / "again.tar.xz", tmp_path / "two" / "runs", later)
    assert (tmp_path / "again.tar.xz").read_bytes() == first
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(first))) as tar:
        assert [(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar] == [
            (0, 0, 0, "", "", 0o644)
        ] * (len(TRIALS) * len(FILES))


def test_what_was_packed_comes_back(tmp_path):
    with archive.unpacked(packed(tmp_path)) as there:
        found = {
            path.relative_to(there.folder).as_posix(): path.read_bytes()
            for path in there.folder.rglob("*")
            if path.is_file()
        }
        assert found == {f"{t}/{name}": data for t in TRIALS for name, data in FILES.items()}
        assert there.name(there.folder / TRIALS[0]) == TRIALS[0]
        assert there.name(tmp_path) is None
    assert not there.folder.exists()


def test_damage_is_one_line_that_names_the_file(tmp_path):
    path = packed(tmp_path)
    whole, chance = path.read_bytes(), random.Random(0)
    places = [*range(8), *(chance.randrange(8, len(whole)) for _ in range(60))]
    damaged = [whole[:p] + bytes([whole[p] ^ 1]) + whole[p + 1 :] for p in places]
    for data in [b"", b"text", *(whole[:p] for p in places), *damaged]:
        path.write_bytes(data)
        with pytest.raises(UserError) as refused, archive.unpacked(path):
            pass
        assert str(refused.value).startswith(f"{path}: damaged, or no tar in xz: ")
        assert "\n" not in str(refused.value)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: No such file"), archive.unpacked(path):
        pass


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "a\\x", "./x", "a//x", "a/./x", "a/x\n", "a/\udcffx"]
)
def test_a_member_that_leads_out_is_refused(tmp_path, name):
    path = written(tmp_path, (tarfile.TarInfo(name), b"1"))
    with pytest.raises(UserError, match="is no plain file of a run's folder"):
        list(archive.members(path))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_are_refused(tmp_path, kind):
    member = tarfile.TarInfo("x")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(UserError, match="'x' is no plain file of a run's folder"):
        list(archive.members(written(tmp_path, (member, b""))))


def test_a_header_that_is_none_is_not_taken_for_the_end(tmp_path):
    path = written(tmp_path, (tarfile.TarInfo("a"), b"1"), after=b"none" * 128)
    with pytest.raises(UserError, match="no member begins at byte 1024"):
        list(archive.members(path))
    assert list(archive.members(written(tmp_path, (tarfile.TarInfo("a"), b"1")))) == [("a", b"1")]


def test_of_a_member_that_is_there_twice_none_is_taken(tmp_path):
    path = written(tmp_path, (tarfile.TarInfo("a/x"), b"1"), (tarfile.TarInfo("a/x"), b"2"))
    with pytest.raises(UserError, match="damaged, or no tar in xz: 'a/x' is there twice"):
        list(archive.members(path))


def test_what_comes_after_the_stream_and_what_is_too_large(tmp_path, monkeypatch):
    path = packed(tmp_path)
    whole = path.read_bytes()
    for more in (b"PK", whole):  # a second archive, say, by cat >>
        path.write_bytes(whole + more)
        with pytest.raises(UserError, match=f"{len(more)} bytes after its end"):
            list(archive.members(path))
    path.write_bytes(whole)
    monkeypatch.setattr(archive, "MAX_BYTES", 4096)
    with pytest.raises(UserError, match="more than 4096 bytes"):
        list(archive.members(path))


def test_a_size_in_a_header_that_no_file_has(tmp_path):
    huge = tarfile.TarInfo("x")
    content = bytearray(huge.tobuf(tarfile.GNU_FORMAT))
    content[124:136] = b"\x80" + b"\x7f" * 11  # base 256
    content[156:157] = b"L"  # a long name of that size
    content[148:156] = b"%06o\0 " % (256 + sum(content[:148]) + sum(content[156:]))
    path = tmp_path / "huge.tar.xz"
    path.write_bytes(lzma.compress(bytes(content) + bytes(1024)))
    with pytest.raises(UserError, match="damaged, or no tar in xz"):
        list(archive.members(path))
