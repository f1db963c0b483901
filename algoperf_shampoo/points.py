"""Points of a search space: every field declared once, and checked against that.

A submission names the fields it reads, one by one or by group: ``FIELDS = "factors", "tau"``. From
the declarations here follow the check before anything is launched, the same check inside the
submission, exported or not, the defaults, the hints of ``SET=``, the names in run labels and the
table in docs/points.md. Imports the standard library alone; exported submissions take it along.
"""

from __future__ import annotations

import collections
import difflib
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REQUIRED: Any = object()
"""In the place of a default: the point must have the field."""


class PointError(ValueError):
    """A field that is unknown, missing, out of range or at odds with another; one line."""


@dataclass(frozen=True)
class Number:
    """A finite number between bounds; an ``integer`` is written without point or exponent."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False
    integer: bool = False

    def accepts(self, value: Any) -> bool:
        kinds = int if self.integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        # Comparing is exact for integers of any size, where float() would overflow.
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def value(self, value: Any) -> Any:
        return value if self.integer else float(value)

    def __str__(self) -> str:
        low = f"{'above' if self.low_open else 'at least'} {self.low:.9g}"
        high = f"{'below' if self.high_open else 'at most'} {self.high:.10g}"
        kind = "an integer of" if self.integer else "a number"
        return f"{kind} {low} and {high}"


@dataclass(frozen=True)
class NumberOr(Number):
    """A number, or one word."""

    word: str = ""

    def accepts(self, value: Any) -> bool:
        return value == self.word if isinstance(value, str) else super().accepts(value)

    def value(self, value: Any) -> Any:
        return value if isinstance(value, str) else super().value(value)

    def __str__(self) -> str:
        return f'{super().__str__()}, or "{self.word}"'


@dataclass(frozen=True)
class Switch:
    """``true`` or ``false``; no string and no number stands for either."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def value(self, value: Any) -> Any:
        return value

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.words

    def value(self, value: Any) -> Any:
        return value

    def __str__(self) -> str:
        return " or ".join(f'"{word}"' for word in self.words)


@dataclass(frozen=True)
class Field:
    """One field of a point.

    Attributes:
        group: the group it belongs to, see :data:`GROUPS`; None for one that a variant names
            itself.
        short: its name in run labels, before the value.
        default: taken where a point lacks it; :data:`REQUIRED` for none.
    """

    name: str
    short: str
    kind: Number | Switch | Choice
    meaning: str
    group: str | None = "common"
    default: Any = REQUIRED


# From here on float32 still tells 1 - x from 1, and powers of it from each other.
_ONE_MINUS_BETA = Number(1e-7, 1)
# At 0, 0 / 0 where a gradient is zero; far below float32's smallest number it would be 0.
_EPSILON = Number(1e-30, 1)

# fmt: off
DECLARED = (
    Field(
        "precondition_frequency", "F", Number(1, 10**9, integer=True),
        "F: steps between two checks of a factor's eigenbasis or root", "factors",
    ),
    Field(
        "tau", "tau", Number(0, 1, high_open=True),
        "threshold of Eq. 11: a basis is recomputed where it is exceeded; 0: at every check",
        None,
    ),
    Field("learning_rate", "lr", Number(1e-12, 1e3), "alpha at its highest, after the warm-up"),
    Field("one_minus_beta1", "1-b1", _ONE_MINUS_BETA, "1 - beta1, of the gradient's average"),
    Field("one_minus_beta2", "1-b2", _ONE_MINUS_BETA, "1 - beta2, of all second moments"),
    Field(
        "epsilon", "eps", _EPSILON,
        "added to sqrt(D); by those without D, and shampoo_grafting, to the factors' eigenvalues",
    ),
    Field("weight_decay", "wd", Number(0, 1e3), "lambda, decoupled from the gradient"),
    Field("warmup_factor", "warmup", Number(0, 1), "share of the schedule that is warm-up"),
    Field(
        "step_hint_factor", "hint", Number(0.01, 100),
        "length of the schedule, in units of the workload's step hint",
    ),
    Field(
        "label_smoothing", "smooth", Number(0, 1, high_open=True),
        "of the cross entropy; workloads with another loss do not use it",
    ),
    Field("dropout_rate", "drop", Number(0, 1, high_open=True), "in models that have dropout"),
    Field(
        "use_nadam", "nadam", Switch(),
        "numerator beta1 M + (1 - beta1) G in place of M", "numerator",
    ),
    Field(
        "nonfinite_gradients", "nonfinite", Choice(("skip", "propagate")),
        "gradients that are not finite: left out, or learnt from", "common", "skip",
    ),
    Field(
        "nonfinite_limit", "badrow", Number(1, 10**9, integer=True),
        "so many gradients in a row that are not finite end the run", "common", 100,
    ),
    Field(
        "max_preconditioner_dim", "dim", Number(8, 65536, integer=True),
        "larger dimensions of a parameter are cut into blocks", "factors",
    ),
    Field(
        "one_dim", "1d", Choice(("full", "adam", "only")),
        "1-D blocks: full-matrix Adam, or Adam; only: those alone are preconditioned",
        "factors", "full",
    ),
    Field(
        "small_matrices", "small", Choice(("vector", "matrix")),
        "parameters with at most max_preconditioner_dim entries: one vector, or a matrix",
        "factors", "vector",
    ),
    Field(
        "matmul_precision", "mm", Choice(("highest", "high")),
        "rotations on a GPU: accurate to float32, or 11 bits as in TF32", "factors", "highest",
    ),
    Field(
        "sharding", "shard", Choice(("auto", "on", "off")),
        "several processes share the work, each keeping the state of some blocks; auto: if, by the "
        "shapes, that saves more than it takes", "factors", "auto",
    ),
    Field(
        "noise_directions", "noise", Choice(("drop", "keep")),
        "coordinates that are rounding: no step, or a step", None, "drop",
    ),
    Field(
        "noise_level", "noiselevel", Number(0, 1e6),
        "what is rounding, in units of eps_machine times the norm of a block's gradients",
        None, 32.0,
    ),
    Field(
        "eigensolver", "solver", Choice(("eigh", "warm")),
        "anew at each refresh, or orthogonal iteration from the old basis first",
        "solver", "eigh",
    ),
    Field(
        "eigen_workspace_mib", "ws", Number(1, 2**20, integer=True),
        "bound on the memory a refresh takes anew, in MiB", "factors", 8,
    ),
    Field(
        "grafting", "graft", Choice(("none", "adam")),
        "the length of a block's update: its own, or Adam's", None, "none",
    ),
    Field(
        "grafting_epsilon", "geps", _EPSILON,
        "epsilon of the Adam that gives the norm", None, 1e-8,
    ),
    Field(
        "exponent_multiplier", "exp", Number(0, 10),
        "a root is A^(-x / 2k) for a block of order k", None,
    ),
    Field(
        "one_minus_beta3", "1-b3", NumberOr(1e-7, 1, word="beta2"),
        "1 - beta3, of D, where it is not the factors'", "ablations", "beta2",
    ),
    Field(
        "basis_aware", "aware", Switch(),
        "D goes over to a new basis by Eq. 27", "ablations", False,
    ),
    Field(
        "freeze_after", "freeze", Number(0, 1),
        "share of the schedule after which no basis is computed anew", "ablations", 1.0,
    ),
    Field(
        "tau_later", "tau2", Number(0, 1, high_open=True),
        "tau of the schedule's last part", "schedule", 0.0,
    ),
    Field(
        "tau_switch", "switch", Number(0, 1),
        "share of the schedule after which tau_later stands in the place of tau; 1: never",
        "schedule", 1.0,
    ),
    Field(
        "trace_scale", "scale", Choice(("paper", "authors")),
        "factors are divided by Tr^((k-1)/k) for a block of order k, or by Tr^(1/2)",
        None, "paper",
    ),
    Field(
        "max_qr_iterations", "I", Number(1, 1000, integer=True),
        "I: QR iterations of a basis at a check, at most (Algorithm 4)", None, 10,
    ),
    Field(
        "eigenvalues", "lambda", Choice(("ema", "decomposition")),
        "by an average of their own, or diag(Q'SQ) when a basis is renewed", None, "ema",
    ),
    Field(
        "eigenvalue_clamp", "clamp", Switch(),
        "lambda^-1/2 is at most max(10, min(d, 4000))", None, True,
    ),
)
# fmt: on
BY_NAME = {field.name: field for field in DECLARED}
GROUPS = {
    "common": ("common", "numerator"),
    "factors": ("common", "numerator", "factors", "solver"),
    "iterated": ("common", "factors"),
    "ablations": ("ablations",),
    "schedule": ("schedule",),
}
"""A group's name, and the groups of fields it stands for. Variants whose bases are iterated by QR
choose no solver, and those that are as their authors have them know no NAdam."""


def fields(names: Iterable[str]) -> tuple[Field, ...]:
    """The fields that ``names``, of groups or single fields, stand for, in their declared order.

    Raises:
        PointError: a name that is neither.
    """
    groups: set[str | None] = set()
    single = set()
    for name in names:
        if name in GROUPS:
            groups.update(GROUPS[name])
        elif name in BY_NAME:
            single.add(name)
        else:
            known = [*GROUPS, *BY_NAME]
            raise PointError(f"{shown(name)} is no declared field{hint(name, known)}")
    return tuple(f for f in DECLARED if f.group in groups or f.name in single)


def check(point: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """``point`` with defaults filled in and numbers as floats, in declared order.

    Args:
        names: what the submission reads, as in its ``FIELDS``.

    Raises:
        PointError: naming the first field that is wrong, its value, and what would be right.
    """
    own = fields(names)
    for name in point:
        if name not in {field.name for field in own}:
            raise PointError(unknown(name, own))
    complete = {}
    for field in own:
        value = point.get(field.name, field.default)
        if value is REQUIRED:
            raise PointError(f"{field.name} is missing: {field.kind}")
        complete[field.name] = check_value(field, value)
    _check_together(complete)
    return complete


def check_value(field: Field, value: Any) -> Any:
    """The value as the submission gets it.

    Raises:
        PointError: it is of another kind or out of range.
    """
    if not field.kind.accepts(value):
        raise PointError(f"{field.name} is {shown(value)}: it must be {field.kind}")
    return field.kind.value(value)


def complete(hyperparameters: Any, names: Iterable[str]) -> Any:
    """What AlgoPerf hands a submission as ``hyperparameters``, checked and completed.

    Returns:
        A namedtuple of all fields in ``names``.

    Raises:
        PointError: see :func:`check`; also where there is no point at all.
    """
    if hyperparameters is None:
        raise PointError("no search-space point given, and this submission needs one")
    given = hyperparameters._asdict() if hasattr(hyperparameters, "_asdict") else hyperparameters
    point = check(given, names)
    return collections.namedtuple("Hyperparameters", point)(**point)


def unknown(name: Any, own: Sequence[Field]) -> str:
    """What to say of a field that is not among ``own``."""
    if name in BY_NAME:
        return f"{name} is a field that this variant does not read"
    return f"{shown(name)} is no field of this variant's points{hint(name, own=own)}"


def hint(word: Any, known: Iterable[str] = (), own: Sequence[Field] = ()) -> str:
    """`` (did you mean ...?)`` with the nearest known word, or nothing.

    Args:
        own: fields, found by their short names too, and by a part of their name.
    """
    if not isinstance(word, str) or len(word) > 100:
        return ""
    names = {key: key for key in known}
    names |= {field.short: field.name for field in own} | {field.name: field.name for field in own}
    lower = {key.lower(): name for key, name in names.items()}
    near = difflib.get_close_matches(word.lower(), lower, n=1)
    parts = [key for key in lower if len(word) > 2 and word.lower() in key]
    found = near or parts
    return f" (did you mean {lower[found[0]]}?)" if found else ""


def shown(value: Any) -> str:
    """A value for a message: as JSON, printable ASCII, cut to 60 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "an integer of more than 40 digits"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = ascii(type(value).__name__)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_setting(text: str, own: Sequence[Field]) -> dict[str, Any]:
    """``learning_rate=0.02 one_dim=adam`` as a dict: JSON scalars, and strings where they are none.

    Raises:
        PointError: a word without ``=``, an unknown field, one given twice, or a bad value.
    """
    by_name = {field.name: field for field in own}
    values: dict[str, Any] = {}
    for word in text.split():
        name, equals, written = word.partition("=")
        if not equals:
            raise PointError(f"{shown(word)} is not of the form field=value")
        if name not in by_name:
            raise PointError(unknown(name, own))
        if name in values:
            raise PointError(f"{name} is there twice")
        values[name] = check_value(by_name[name], _scalar(written))
    return values


def label(values: Mapping[str, Any]) -> str:
    """Values of fields as the end of a run's label, safe in a file name: ``_F20_lr0.02_1dadam``.

    In declared order, and different for different values; what would be longer than 140
    characters ends in a digest of all of it.
    """
    words = []
    for field in DECLARED:
        if field.name in values:
            value = field.kind.value(values[field.name])
            if isinstance(value, float):
                value = int(value) if value.is_integer() and abs(value) < 1e6 else value
            text = value if isinstance(value, str) else json.dumps(value)
            joint = "-" if field.short[-1].isdigit() else ""
            words.append(f"_{field.short}{joint}{text}")
    whole = "".join(words)
    if len(whole) <= 140:
        return whole
    kept = ""
    for word in words:
        if len(kept + word) < 125:
            kept += word
    return f"{kept}_{hashlib.sha256(whole.encode()).hexdigest()[:12]}"


def is_label(text: str) -> bool:
    """Whether ``text`` could be what :func:`label` gives, nothing at all included."""
    return _label_pattern().fullmatch(text) is not None


@functools.cache
def _label_pattern() -> re.Pattern[str]:
    number = r"-?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?"
    words = []
    for field in DECLARED:
        named = getattr(field.kind, "words", ()) or (getattr(field.kind, "word", ""),)
        values = [number, "true", "false", "null", *(re.escape(w) for w in named if w)]
        joint = "-" if field.short[-1].isdigit() else ""
        words.append(f"_{re.escape(field.short)}{joint}(?:{'|'.join(values)})")
    return re.compile(f"(?:{'|'.join(words)})*(?:_[0-9a-f]{{12}})?")


def table(variants: Mapping[str, Iterable[str]]) -> str:
    """All fields as a Markdown table.

    Args:
        variants: each variant's name and its ``FIELDS``.
    """
    reads = {name: {f.name for f in fields(names)} for name, names in variants.items()}
    lines = ["| field | values | default | read by | meaning | in labels |", "|" + " --- |" * 6]
    for field in DECLARED:
        own = [name for name in reads if field.name in reads[name]]
        who = "all" if len(own) == len(reads) else ", ".join(f"`{name}`" for name in own)
        default = "needed" if field.default is REQUIRED else f"`{json.dumps(field.default)}`"
        lines.append(
            f"| `{field.name}` | {field.kind} | {default} | {who or 'none'} "
            f"| {field.meaning} | `{field.short}` |"
        )
    return "\n".join(lines) + "\n"


def _check_together(point: Mapping[str, Any]) -> None:
    """Fields that are each in range and fail in company."""
    rate, decay = point.get("learning_rate", 0.0), point.get("weight_decay", 0.0)
    if rate * decay >= 1:
        raise PointError(
            f"learning_rate {rate} times weight_decay {decay} is {rate * decay:.3g}: below 1, or "
            "decay alone turns the sign of every weight"
        )
    multiplier = point.get("exponent_multiplier")
    if multiplier is not None:
        # The largest root: of a 1-D block, from an eigenvalue of 0. float32 ends at 3e38.
        digits = -math.log10(point["epsilon"]) * multiplier / 2
        if digits > 30:
            raise PointError(
                f"epsilon {point['epsilon']} with exponent_multiplier {multiplier}: roots up to "
                f"epsilon^(-x/2) = 1e{digits:.0f}: at most 1e30, so that float32 holds them"
            )
    # Of a block of order 3, whose factors all have the exponent 1/2.
    if "trace_scale" in point and (digits := -math.log10(point["epsilon"]) * 1.5) > 30:
        raise PointError(
            f"epsilon {point['epsilon']}: roots up to epsilon^(-3/2) = 1e{digits:.0f}: at most "
            "1e30, so that float32 holds them"
        )


def vanishes(text: str, value: Any) -> bool:
    """Whether a number other than 0 was written that no float64 is near: 1e-400."""
    return value == 0 and any(digit in text.lower().partition("e")[0] for digit in "123456789")


def _scalar(text: str) -> Any:
    """A JSON number, true, false or null; anything else as a string."""
    if len(text) > 100:
        return text
    try:
        value = json.loads(text, parse_constant=lambda word: word)
    except ValueError:
        return text
    if isinstance(value, (list, dict)) or (isinstance(value, float) and vanishes(text, value)):
        return text
    return value
