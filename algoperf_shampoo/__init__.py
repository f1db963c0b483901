"""Shampoo-family optimizers as AlgoPerf submissions, with a small embedded harness."""

__version__ = "0.1.0"
