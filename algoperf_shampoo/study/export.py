"""A submission as a folder of its own, in the layout of mlcommons/submissions_algorithms.

``<out>/external_tuning/<variant>/`` gets submission.py, tuning_search_space.json,
submission_info.yml, LICENSE and ``algorithm/``, the modules that it needs
(:mod:`..harness.standalone`). In ``<out>/self_tuning/<variant>/`` the point is built into
submission.py in place of the search space.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from algoperf_shampoo import __version__, json_input, points
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import hparams, standalone, submission_loader

RECORD, INFO = "export.json", "submission_info.yml"
RULESETS = {"external": "external_tuning", "self": "self_tuning"}
"""AlgoPerf's rulesets as its runner calls them, and the folders of submissions_algorithms."""


def export(
    root: Path,
    variant: str,
    out: Path,
    authors: str = "",
    affiliations: str = "",
    *,
    f: str | None = None,
    tau: str | None = None,
    settings: str | None = None,
    search_space: Path | None = None,
    ruleset: str = "external",
) -> Path:
    """Write the folder of one variant and return it; an earlier export there is replaced.

    Args:
        f, tau, settings: what ``F=``, ``TAU=`` and ``SET=`` say: fields of the points to replace.
            The folder is then called after them as well.
        search_space: another file than the variant's own.
        ruleset: "external", or "self": the variant's one point is built in.

    Raises:
        UserError: unknown variant or ruleset, bad search space or setting, text that AlgoPerf's
            workflows would not take as it is, or another folder in the way.
    """
    variant = variant.replace("-", "_")
    fields = submission_loader.fields(root, variant)
    if ruleset not in RULESETS:
        raise UserError(f"RULESET={ruleset}: there is {', '.join(RULESETS)}")
    space = search_space or root / "search_spaces" / f"{variant}.json"
    changes = hparams.parse_settings(fields, f, tau, settings)
    name = folder_name(variant, changes)
    target = out / RULESETS[ruleset] / name
    if target.exists() and not (target / RECORD).is_file():
        raise UserError(f"{target}: exists and is not an export; set OUT= to another folder")
    record: dict[str, Any] = {"package": standalone.PACKAGE, "version": __version__}
    record |= {"variant": variant, "ruleset": ruleset, "settings": changes}
    record |= {"authors": authors, "affiliations": affiliations}
    if ruleset == "self":
        record["point"] = hparams.one_point(space, fields, changes)
        files = standalone.entry(root, variant, record["point"])
    else:
        files = standalone.entry(root, variant)
        files["tuning_search_space.json"] = _tuning(space, fields, changes)
    files["LICENSE"] = (root / "LICENSE").read_text(encoding="utf-8")
    files[INFO] = info_text(info(root, variant, changes, ruleset, authors, affiliations))
    record["sha256"] = {
        file: hashlib.sha256(text.encode()).hexdigest() for file, text in files.items()
    }
    files[RECORD] = json.dumps(record, indent=1) + "\n"

    fresh = target.with_name(f".{name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    standalone.write(fresh, files)
    if target.exists():
        shutil.rmtree(target)
    fresh.rename(target)
    return target


def _tuning(space: Path, fields: Sequence[str], changes: dict[str, Any]) -> str:
    """The search space as it goes into the export: the file itself, unless fields are replaced."""
    own = hparams.read_points(space, 1, fields)
    if not changes:
        return space.read_text(encoding="utf-8")
    found = json_input.read(space)
    if not isinstance(found, list):
        raise UserError(f"{space}: ranges; F=, TAU= and SET= replace fields of a list of points")
    own = hparams.read_points(space, len(found), fields)
    changed = [hparams.override(point, changes, fields, where=str(space)) for point in own]
    return json.dumps(changed, indent=2) + "\n"


def folder_name(variant: str, changes: dict[str, Any]) -> str:
    """Of an export: the variant and what was set, in small letters, importable."""
    return re.sub(r"\W", "_", variant + points.label(changes), flags=re.ASCII).lower()


def info(
    root: Path,
    variant: str,
    changes: dict[str, Any],
    ruleset: str,
    authors: str,
    affiliations: str,
) -> dict[str, str]:
    """The fields of ``submission_info.yml`` and of the YAML block of a pull request.

    Raises:
        UserError: a text with a character that submissions_algorithms' workflows cut off or expand.
    """
    source = root / "submissions" / variant / "submission.py"
    about = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or variant
    fields = {
        "submission_name": (variant + points.label(changes)).replace("_", " "),
        "submission_folder": folder_name(variant, changes),
        "authors": authors,
        "affiliations": affiliations,
        "version": __version__,
        "ruleset": {"external": "external", "self": "self-tuning"}[ruleset],
        "framework": "PyTorch",
        "description": about,
    }
    plain = {key: " ".join(value.split()) for key, value in fields.items()}
    for key, value in plain.items():
        # They cut a line at #, and write it by a shell that expands the others.
        odd = next((c for c in value if c in "#$`\\" or not c.isprintable()), None)
        if odd is not None:
            raise UserError(f"{key.upper()}={value[:60]}: {odd!r} would not survive a workflow")
    return plain


def info_text(fields: dict[str, str]) -> str:
    """The fields as YAML; values are JSON strings, which YAML reads as they are."""
    return "".join(f"{k}: {json.dumps(v, ensure_ascii=False)}\n" for k, v in fields.items())
