"""What the scripts share: one line and exit code 2 for a user's mistake, 130 and 143 for signals.

To be imported first, for signals are handled from then on.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that scripts run without the package being installed

from algoperf_shampoo import interrupt  # noqa: E402

if ROOT / "scripts" in Path(getattr(sys.modules["__main__"], "__file__", "")).resolve().parents:
    interrupt.install()  # now: what is imported below takes seconds

REMEDY = "pip install -e '.[run]' brings it"
try:
    from absl import app, flags, logging
except ModuleNotFoundError as missing:
    print(f"error: {sys.executable}: no module {missing.name}: {REMEDY}", file=sys.stderr)
    sys.exit(2)

from algoperf_shampoo import paths  # noqa: E402
from algoperf_shampoo.errors import UserError  # noqa: E402


def run(main: Callable[[], int]) -> None:
    """Parse flags, call ``main`` and exit with its code; on bad input print one line and exit 2."""

    def guarded(arguments: Sequence[str]) -> int:
        try:
            if len(arguments) > 1:
                raise UserError(f"unexpected argument {arguments[1]!r}: flags start with --")
            return main()
        except UserError as error:
            return _fail(error)
        except interrupt.Interrupted as stop:
            print(stop.line, file=sys.stderr)
            return 128 + stop.signal_number
        except BrokenPipeError:  # `make table1 | head`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # as a shell reports SIGPIPE
        except ModuleNotFoundError as missing:
            if missing.name != "torch":
                raise
            return _fail(UserError(f"{sys.executable}: no module torch: {REMEDY}"))
        except OSError as error:
            return _fail(UserError(paths.complaint(error)))

    logging.set_verbosity(logging.WARNING)  # a run prints its own progress
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path's name may be no text
            stream.reconfigure(errors="backslashreplace")
    app.run(guarded, flags_parser=_parse)


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        return list(flags.FLAGS(arguments))
    except flags.Error as error:
        sys.exit(_fail(UserError(_words(str(error)))))


def _words(text: str) -> str:
    """What absl says of a flag, as of the word it came from, where it says it as a tuple."""
    form = r"flag --(\w+)=(.*): \('Non-boolean argument to boolean flag'.*"
    match = re.fullmatch(form, text, re.DOTALL)
    return f"{match[1].upper()}={match[2][:60]}: 1, or 0 as without it" if match else text


def _fail(error: Exception) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2
