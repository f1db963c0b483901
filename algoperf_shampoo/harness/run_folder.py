"""One run's folder: whose it is, and what it holds. (Who may write to it: :mod:`.run_lock`.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import seal
from algoperf_shampoo.harness.record import write_json

_RECORD = "run.json"


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """The content of ``run.json``, None if the folder has none.

    Raises:
        UserError: the file is not what this harness writes.
    """
    path = run_dir / _RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); remove the folder or set OUT="
        ) from None
    if not isinstance(record, dict) or "identity" not in record:
        raise UserError(f"{path}: not the record of an embedded run; set OUT= to another folder")
    return record


def write_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Replace ``run.json``, with its own digest (:mod:`.seal`), which ``record`` is given too."""
    record[seal.RECORD] = seal.digest(record)
    write_json(run_dir / _RECORD, record)


def check(run_dir: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The folder's record if it is of this very run, None if the folder is new. Writes nothing.

    Raises:
        UserError: the folder holds another run, or something that is no run.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir}: a file is where the run's folder would be; set OUT=")
    record = read_record(run_dir)
    if record is None:
        if run_dir.is_dir() and any(path.name[0] != "." for path in run_dir.iterdir()):
            raise UserError(
                f"{run_dir}: holds files but no {_RECORD}: not a run of the embedded harness; "
                "set OUT= to another folder"
            )
        return None
    difference = _first_difference(record["identity"], json.loads(json.dumps(identity)))
    if difference:
        key, there, here = difference
        raise UserError(
            f"{run_dir}: holds another run: {key} is {_short(there)} there and {_short(here)} "
            "now; set OUT= to another folder, or remove this one"
        )
    return record


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*new, *(name for name in old if name not in new)]:
            where = f"{key}.{name}" if key else name
            if name not in old or name not in new:
                return where, old.get(name, "absent"), new.get(name, "absent")
            difference = _first_difference(old[name], new[name], where)
            if difference:
                return difference
        return None
    return None if old == new else (key, old, new)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "..."
