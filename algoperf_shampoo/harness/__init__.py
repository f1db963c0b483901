"""The embedded harness: AlgoPerf's submission contract and file formats, in one process."""
