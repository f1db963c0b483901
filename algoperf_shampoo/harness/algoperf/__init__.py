"""The door to AlgoPerf's own ``submission_runner.py``: checks, commands, resuming."""
