"""Eigendecompositions of stacks of symmetric matrices: :class:`.solvers.Solver` and its back
ends."""
