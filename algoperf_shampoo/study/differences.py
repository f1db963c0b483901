"""What sets a row of a table apart: where its point differs from its variant's own point."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo import points, versions
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.harness.spec import MINI, MINIDATA
from algoperf_shampoo.study import files
from algoperf_shampoo.study.logs import Trial

F_KEY, TAU_KEY = "precondition_frequency", "tau"
_SHORT = {F_KEY: "F"}
_STEPS = re.compile(r"_steps(\d+)(?:_|$)")
_ABSENT = object()

Key = tuple[Any, ...]
"""Of a row, see :func:`.pooling.row_of`: workload, benchmark version, label, point as JSON, tuning
ruleset, framework, where there is no point the number of the trial, then the terms of the runs."""
_RUN = {
    1: "version", 4: "ruleset", 5: "framework", 7: "target", 8: "steps at most",
    9: "seconds at most", 10: "data",
}  # fmt: skip
_SUFFIX = re.compile(
    r"(?P<point>.*?)(_steps[0-9]+)?"
    rf"(_(?:{'|'.join(map(re.escape, versions.NAMES))}))?(_allsteps)?(_self)?"
)


@dataclass(frozen=True)
class Difference:
    """A field of a row's point, and its value in the variant's own point.

    ``own`` is None where there is no such point, or the field is not in it.
    """

    field: str
    value: Any
    own: Any = None

    def text(self) -> str:
        """``learning_rate = 0.02 (0.01)``: the variant's own in brackets."""
        own = "" if self.own is None else f" ({_shown(self.own)})"
        return f"{_SHORT.get(self.field, self.field)} = {_shown(self.value)}{own}"


def find(groups: Mapping[Key, Sequence[Trial]], root: Path) -> dict[Key, list[Difference]]:
    """For each row, the fields that differ from its variant's own point, in the point's order.

    Rows that would be alike all the same (of labels that are no variant's, say) get the fields in
    which they differ from each other. ``root`` is the repository.
    """
    variants = submission_loader.variants(root)
    found: dict[Key, list[Difference]] = {}
    for key, group in groups.items():
        variant = variant_of(group[0], variants)
        has_point = variant is not None and group[0].hparams is not None
        own = own_point(root, variant, key[0]) if variant and has_point else None
        point = group[0].hparams or {}
        found[key] = _between(point, own) if own is not None else []
        steps = _STEPS.search(key[2])
        if steps:
            found[key].append(Difference("STEPS", int(steps[1])))
    for alike in _alike(found, groups, variants):
        # Null is a value, and not the same as a field that is not there.
        known = {key: p for key in alike if (p := groups[key][0].hparams) is not None}
        for name in dict.fromkeys(name for point in known.values() for name in point):
            values = {key: point.get(name, _ABSENT) for key, point in known.items()}
            if len({json.dumps(v, default=str) for v in values.values()}) > 1:
                for key, value in values.items():
                    found[key].append(Difference(name, "absent" if value is _ABSENT else value))
        for place, name in _RUN.items():
            if len({key[place] for key in alike}) > 1:
                for key in alike:
                    found[key].append(Difference(name, key[place]))
    return found


def staleness(point: Mapping[str, Any]) -> float | None:
    """F(1 - beta2): steps between two checks of the basis, over the averages' memory in steps.

    The share of a factor that is new since its last check is 1 - beta2^F, about 1 - exp(-F(1 -
    beta2)). None where the point has no F or no beta2 (published points have either spelling).
    """
    frequency, kept = files.finite(point.get(F_KEY)), files.finite(point.get("beta2"))
    forgotten = files.finite(point.get("one_minus_beta2"))
    if forgotten is None and kept is not None:
        forgotten = 1.0 - kept
    if frequency is None or forgotten is None:
        return None
    return files.finite(frequency * forgotten)


def settings(point: Mapping[str, Any], differs: Sequence[Difference]) -> list[str]:
    """What to print of a row: F and tau, as far as the point has them, then what differs."""
    by_name = {difference.field: difference for difference in differs}
    first = [
        by_name.get(name) or Difference(name, point[name])
        for name in (F_KEY, TAU_KEY)
        if name in by_name or point.get(name) is not None
    ]
    rest = [d for d in differs if d.field not in (F_KEY, TAU_KEY)]
    return [difference.text() for difference in [*first, *rest]]


def name_of(key: Key, group: Sequence[Trial], variants: Sequence[str]) -> str:
    """What a row is called: its variant, or the label of what is none of ours."""
    ours = group[0].hparams is not None
    return (variant_of(group[0], variants) if ours else None) or str(key[2])


def variant_of(trial: Trial, variants: Sequence[str]) -> str | None:
    """The variant that a run is of, None for none of ``variants``.

    As its record says. Without one the label must be a variant's and overrides as :mod:`.plan`
    writes them, ``eshampoo_fixed_F20_self``: ``eshampoo_fixed_mine`` is another submission.
    """
    if trial.variant is not None:
        return trial.variant if trial.variant in variants else None
    fitting = [v for v in variants if _is_label_of(trial.label, v)]
    return max(fitting, key=len, default=None)


def _is_label_of(label: str, variant: str) -> bool:
    rest = _SUFFIX.fullmatch(label.removeprefix(variant)) if label.startswith(variant) else None
    return rest is not None and points.is_label(rest["point"])


def own_point(root: Path, variant: str, workload: str) -> dict[str, Any] | None:
    """The first point of the variant's own search space for a workload; None of no such file."""
    folder = root / "search_spaces"
    if workload.endswith(MINI):
        folder /= "mini"
    try:
        space = json.loads((folder / f"{variant}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(space, dict):
        space = space.get(workload.removesuffix(MINI).removesuffix(MINIDATA))
    first = space[0] if isinstance(space, list) and space else None
    return first if isinstance(first, dict) else None


def _between(point: Mapping[str, Any], own: Mapping[str, Any]) -> list[Difference]:
    found = []
    for name in dict.fromkeys([*own, *point]):
        here, there = point.get(name, _ABSENT), own.get(name, _ABSENT)
        # 1 and 1.0 are one value, 1 and true are not.
        same = here == there and isinstance(here, bool) == isinstance(there, bool)
        if not same:
            value = "absent" if here is _ABSENT else here
            found.append(Difference(name, value, None if there is _ABSENT else there))
    return found


def _alike(
    found: Mapping[Key, list[Difference]],
    groups: Mapping[Key, Sequence[Trial]],
    variants: Sequence[str],
) -> list[list[Key]]:
    """Rows of one workload that would be printed alike."""
    alike: dict[tuple[Any, ...], list[Key]] = {}
    for key, differs in found.items():
        point, trial = groups[key][0].hparams or {}, groups[key][0].trial
        name = name_of(key, groups[key], variants)
        shown = (key[0], name, trial, tuple(settings(point, differs)))
        alike.setdefault(shown, []).append(key)
    return [keys for keys in alike.values() if len(keys) > 1]


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
