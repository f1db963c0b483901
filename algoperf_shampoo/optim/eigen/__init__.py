"""Eigendecompositions of stacks of symmetric matrices: :class:`.solver.Solver` and its back
ends."""
