"""Refuse words of make's command line that its targets do not take, naming the nearest that is.

Run by the Makefile before anything is installed: standard library only. The words' values are in
the environment, where make puts its command line's variables.
"""

import argparse
import difflib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from algoperf_shampoo.points import BY_NAME  # noqa: E402

# What people type, and the field of a point or the word they mean.
SHORT = {"LR": "learning_rate", "WD": "weight_decay", "EPS": "epsilon", "SEED": "SEEDS"}


def main():
    """Print one line a word; 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goals", default="")
    parser.add_argument("--taken", default="")
    parser.add_argument("--known", default="")
    parser.add_argument("refused", nargs="+")
    options = parser.parse_args()
    for word in options.refused:
        line = refusal(
            word,
            os.environ.get(word, ""),
            options.goals.split() or ["help"],
            options.taken.split(),
            options.known.split(),
            sorted(BY_NAME),
        )
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return 2


def refusal(word, value, goals, taken, known, point_fields):
    """Why a word is refused, and what would be right.

    Args:
      goals: the targets of the command line.
      taken: words that these take; known: words that any target takes.
      point_fields: fields of hyperparameter points.
    """
    targets = "make " + " ".join(goals)
    takes = ", ".join(taken) if len(taken) < 9 else "what make help lists"
    if word in known:
        return f"{word}={value}: {targets} does not take {word}; it takes {takes}"
    meant = SHORT.get(word, word)
    near, likeness = nearest(meant.upper(), taken)
    field, field_likeness = nearest(meant.lower(), point_fields if "SET" in taken else [])
    if field and field_likeness > likeness:
        return f"{word}={value}: no such word; a field of the point is set by SET='{field}={value}'"
    if near == "SEEDS" and value.isdecimal():
        return f"{word}={value}: no such word; SEEDS={value}, is that seed, SEEDS={value} so many"
    if near:
        return f"{word}={value}: no such word; did you mean {near}={value}?"
    return f"{word}={value}: no such word; {targets} takes {takes}"


def nearest(word, choices):
    """The choice most like ``word`` and how like it is, 0 to 1; (None, 0) if none is."""
    near = next(iter(difflib.get_close_matches(word, choices, n=1, cutoff=0.7)), None)
    return near, difflib.SequenceMatcher(None, near, word).ratio() if near else 0.0


if __name__ == "__main__":
    sys.exit(main())
