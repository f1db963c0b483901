"""Damaged search spaces: each is a point that trains, or one line that says why not.

The sample of `make test` is the beginning of the 5,000 of the marker `faults`: one seed, so that a
number in a failure finds its file again.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.study import plan
from tests import test_points

ROOT = Path(__file__).parents[2]
SPACES = sorted((ROOT / "search_spaces").rglob("*.json"))
RANGES = {
    "learning_rate": {"min": 1e-4, "max": 1e-2, "scaling": "log"},
    "warmup_factor": {"min": 0.02, "max": 0.1, "scaling": "linear"},
    "use_nadam": {"feasible_points": [True, False]},
}
# Written as they stand: most are no JSON, or values that JSON should not hold.
VALUES = [
    "null", "true", "0", "-1", "1", "-0.0", "2.0", "1e308", "1e-308", "5e-324", "1e309", "-1e999",
    "NaN", "Infinity", "-Infinity", "1e1000000", "0x10", "1_0", "+1", "01", ".5",
    "''", '""', '"no"',
    '"1"', '"half"', '"full"', '"high"', '"warm"', '"\\ud800"', '"\\u0000"', '"\u00e9\u202e\x7f"',
    "[]", "{}", "[1, 2]", '{"min": 1}', '{"min": 0, "max": 1, "scaling": "log"}',
    '{"feasible_points": [1]}', '{"feasible_points": []}', '{"min": 1, "max": 0, "scaling": []}',
    "9" * 400, "1" + "0" * 310, "9" * 5000, "1." + "3" * 3000,
    "[" * 3000 + "]" * 3000, "[" * 100_000,
    '{"a":' * 2000 + "1" + "}" * 2000, "// x", "\ufeff1", '"' + "x" * 10_000 + '"',
]  # fmt: skip
NAMES = [
    "class", "learning rate", "", "__class__", "_replace", "matmul_precison", "tau", "F", "1x",
    "\x00", "\ud800", "lr", "x" * 5000, "precondition_frequency", "feasible_points", "fastmri",
    "def", "\n",
]  # fmt: skip


def damage_bytes(text: bytes, draw: random.Random) -> bytes:
    """Bytes lost, doubled, changed or put in between, at a few places."""
    data = bytearray(text)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((1, 2, 8, 100)))
        kind = draw.randrange(5)
        if kind == 0:
            del data[at:end]
        elif kind == 1:
            data[at:at] = data[at:end]
        elif kind == 2:
            data[at:end] = draw.randbytes(end - at)
        elif kind == 3:
            data[at:at] = draw.choice((b"\xff", b"[", b"{", b'"', b",", b"-", b"9e9", b"\\u"))
        else:
            del data[at:]
    return bytes(data)


def damage_value(text: bytes, draw: random.Random) -> bytes:
    """One field's value replaced by what VALUES holds, its name by what NAMES holds, or doubled."""
    lines = text.decode().split("\n")
    at = draw.choice([i for i, line in enumerate(lines) if ": " in line])
    name, _, value = lines[at].partition(": ")
    comma = "," if value.endswith(",") else ""
    kind = draw.randrange(6)
    if kind <= 2:
        lines[at] = f"{name}: {draw.choice(VALUES)}{comma}"
    elif kind == 3:
        lines[at] = f"{json.dumps(draw.choice(NAMES), ensure_ascii=True)}: {value}"
    elif kind == 4:
        lines.insert(at, f"{name}: {draw.choice(VALUES)},")
    else:
        del lines[at]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def damage_number(text: bytes, draw: random.Random) -> bytes:
    """Numbers moved by a few or by many powers of ten; whole ones stay whole or do not."""

    def moved(match: re.Match[str]) -> str:
        if draw.random() < 0.9:
            return match[0]
        value = float(match[1]) * 10 ** draw.choice((draw.gauss(0, 1), draw.gauss(0, 20)))
        value = round(value) if draw.random() < 0.5 else value
        return f": {json.dumps(value)}"

    return re.sub(r": (-?\d[\d.e+-]*)", moved, text.decode()).encode()


def damage_shape(text: bytes, draw: random.Random) -> bytes:
    """The file's parts wrapped, unwrapped, emptied, or turned into ranges that are damaged."""
    space = json.loads(text)
    point = space[0] if isinstance(space, list) else next(iter(space.values()))[0]
    drawn = {k: {"feasible_points": [v]} for k, v in point.items()} | RANGES
    shapes: list[Callable[[], Any]] = [
        lambda: [space],
        lambda: {"ogbg": space},
        lambda: [point, {**point, draw.choice(NAMES): 1}],
        lambda: [point, draw.choice([None, 3, [], {}, "x", point])],
        lambda: point,
        lambda: {k: draw.choice([v, None, [], [v], [v, v]]) for k, v in point.items()},
        lambda: [{k: v for k, v in point.items() if draw.random() < 0.9}],
        lambda: drawn,
        lambda: {**drawn, draw.choice(list(drawn)): draw.choice([3, None, [], {}, {"min": 1}])},
    ]
    result = draw.choice(shapes)()
    written = json.dumps(result, indent=1).encode()
    return damage_value(written, draw) if draw.random() < 0.5 and b": " in written else written


def damaged(number: int) -> tuple[str, bytes]:
    """Number ``number`` of the damaged search spaces, and the variant it belongs to."""
    draw = random.Random(20261126 * 10_000 + number)
    path = draw.choice(SPACES)
    kinds = (damage_bytes, damage_value, damage_value, damage_number, damage_shape)
    return path.stem, draw.choice(kinds)(path.read_bytes(), draw)


def outcome(number: int, folder: Path) -> dict[str, Any] | None:
    """The point of the damaged search space, or None where it is refused in one line."""
    variant, content = damaged(number)
    path = folder / f"{number}.json"
    path.write_bytes(content)
    harness = ("embedded", "algoperf")[number % 2]
    try:
        made = plan.make_plan(
            ROOT, [variant], search_space=str(path), out=str(folder / "out"), harness=harness
        )
    except UserError as error:
        message = str(error)
        assert message.startswith(str(path)) or f"{number}.json" in message, (number, message)
        assert len(message) < 600 and message.isprintable() and message.isascii(), (number, message)
        return None
    finally:
        path.unlink()
    assert not (folder / "out").exists()
    return {"variant": variant, "point": made.runs[0].hparams}


def fuzz(numbers: range, folder: Path, trained: int) -> dict[str, int]:
    """Every number's outcome; points that pass, up to ``trained`` of them, train a tiny model."""
    count = {"refused": 0, "passed": 0, "trained": 0}
    for number in numbers:
        found = outcome(number, folder)
        count["passed" if found else "refused"] += 1
        if found and count["trained"] < trained:
            test_points.steps(found["variant"], found["point"])
            count["trained"] += 1
    return count


def test_a_damaged_search_space_is_refused_in_one_line_or_trains(tmp_path):
    count = fuzz(range(300), tmp_path, trained=20)
    assert count["refused"] > 150 and count["passed"] >= count["trained"] == 20, count


@pytest.mark.faults
def test_5000_damaged_search_spaces(tmp_path):
    count = fuzz(range(5000), tmp_path, trained=5000)
    print(count)
    assert count["refused"] > 2500 and count["trained"] == count["passed"] > 300, count


@pytest.mark.faults
def test_the_script_itself_ends_with_one_line_and_exit_code_2(tmp_path):
    refused = [n for n in range(120) if outcome(n, tmp_path) is None][:25]
    for number in refused:
        variant, content = damaged(number)
        path = tmp_path / "space.json"
        path.write_bytes(content)
        words = [f"--variant={variant}", f"--search_space={path}", f"--out={tmp_path}/out"]
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "submit.py", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and done.stdout == "", (number, done.stderr)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert len(refused) == 25
    assert set(submission_loader.variants(ROOT)) >= {damaged(n)[0] for n in refused}
