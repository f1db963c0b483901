"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# Examples are not timed: on a busy machine a slow one is no failure. The same ones each time.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
