"""What rules compute on stacks, as a vocabulary that tests speak to every back end alike.

:class:`Machine` hands each operation to a back end (:class:`~.arithmetic.Arithmetic` or
:class:`~.gpu.grouped.Grouped`) and does the same in float64 beside it, row by row, with the
functions of :mod:`.reference`. After any operation the two must agree.
"""

import torch

from algoperf_shampoo.optim.arithmetic import Arithmetic, Hyper
from algoperf_shampoo.optim.blocking import cut
from algoperf_shampoo.optim.buckets import Layout
from algoperf_shampoo.optim.eigenbasis import build_factor_sets
from algoperf_shampoo.optim.gpu.grouped import Grouped
from algoperf_shampoo.optim.reference import from_basis, matricize, mode_product, to_basis

# Orders 1 to 4; one row, and three.
SHAPES = [(12,), (9, 7), (9, 7), (9, 7), (20, 5), (4, 6, 3), (5, 3, 4, 2)]
BETA1, BETA2, EPS = 0.9, 0.99, 1e-12
TOLERANCE = 2e-6


def exact(x):
    return x.detach().double().cpu().clone()


class Machine:
    """Values are lists of tensors [B, *shape], one of each stack; ``self.x`` is the current one.

    Args:
        kernels: whether operations go by our kernels, else by torch.
    """

    def __init__(self, device, kernels, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        params = [torch.nn.Parameter(torch.zeros(s, device=device)) for s in SHAPES]
        self.layout = Layout(params, lambda p: cut(tuple(p.shape), 20))
        self.stacks = self.layout.stacks
        build_factor_sets(self.stacks)
        self.layout.allocate(lambda stack: ("exp_avg", "exp_avg_sq"), scratch=True)
        self.arithmetic = Grouped(self.stacks) if kernels else Arithmetic()
        corrections = {}
        for s in self.stacks:
            for q in s.operators:
                q.copy_(torch.linalg.qr(self.draw(q.shape)).Q)
            rows = torch.arange(len(s), device=device).view(-1, *[1] * len(s.shape)) / 50
            corrections[id(s)] = 0.3 + rows, 0.2 + rows
        self.h = Hyper(0.0, BETA1, BETA2, EPS, 0.0, True, "highest", corrections)
        self.m = [exact(s.state["exp_avg"]) for s in self.stacks]
        self.v = [exact(s.state["exp_avg_sq"]) for s in self.stacks]
        self.factors = [[exact(f) for f in s.factors] for s in self.stacks]
        self.gradient()

    def draw(self, shape):
        return torch.randn(shape, generator=self.random)

    def gradient(self):
        """New gradients, of another size in every row."""
        for s in self.stacks:
            for row in s.g:
                row.copy_(self.draw(s.shape) * 10 ** self.draw(()).item())
        self.arithmetic.gradients_came(self.stacks)
        self.x = [s.g for s in self.stacks]
        self.expected = [exact(x) for x in self.x]

    def gram(self):
        """factor <- 0.5 factor + 0.25 X X'."""
        self.arithmetic.gram_ema(self.stacks, 0.5, 0.25)
        for s, factors, xs in zip(self.stacks, self.factors, self.expected, strict=True):
            for mode, factor in enumerate(factors):
                for row, x in enumerate(xs):
                    X = matricize(x, mode)
                    factor[row] = 0.5 * factor[row] + 0.25 * X @ X.T
            for mine, factor in zip(s.factors, factors, strict=True):
                self.agree([mine], [factor])

    def _bases(self, s, row):
        return [exact(q[row]) for q in s.operators]

    def _rowwise(self, function):
        return [
            torch.stack([function(x, self._bases(s, row)) for row, x in enumerate(xs)])
            for s, xs in zip(self.stacks, self.expected, strict=True)
        ]

    def rotate(self):
        self.expected = self._rowwise(to_basis)
        self.x = self.arithmetic.rotate(self.stacks, self.x, self.h)
        self.agree(self.x, self.expected)

    def adam(self):
        self.arithmetic.adam(self.stacks, self.x, self.h)
        for i, s in enumerate(self.stacks):
            x = self.expected[i]
            self.m[i] = BETA1 * self.m[i] + (1 - BETA1) * x
            self.v[i] = BETA2 * self.v[i] + (1 - BETA2) * x**2
            c1, c2 = (c.double().cpu() for c in self.h.corrections[id(s)])
            numerator = (BETA1 * self.m[i] + (1 - BETA1) * x) / c1
            self.expected[i] = numerator / ((self.v[i] / c2).sqrt() + EPS)
        self.agree([s.state["exp_avg"] for s in self.stacks], self.m)
        self.agree([s.state["exp_avg_sq"] for s in self.stacks], self.v)
        self.agree(self.x, self.expected)

    def rotate_back(self):
        self.expected = self._rowwise(from_basis)
        self.arithmetic.rotate_back(self.stacks, self.x, self.h)
        self.x = [s.g for s in self.stacks]
        self.agree(self.x, self.expected)

    def move_moments(self):
        """exp_avg into its basis, mode by mode, and D's rows by turns."""
        for i, s in enumerate(self.stacks):
            for mode in range(len(s.shape)):
                for rows in ([0], list(range(len(s)))):
                    for row in rows:
                        q = exact(s.operators[mode][row])
                        self.m[i][row] = mode_product(self.m[i][row], q.T, mode)
                    self.arithmetic.rotate_mode_(s, s.state["exp_avg"], mode, rows, back=False)
        self.agree([s.state["exp_avg"] for s in self.stacks], self.m)

    def torch_scale(self, factor=4.0):
        """Plain torch on the current value: no operation of the back end is told."""
        for x in self.x:
            x.mul_(factor)
        self.expected = [factor * x for x in self.expected]

    def torch_fresh(self):
        """The current value in memory of its own; ``g`` and ``scratch`` hold something else."""
        self.x = [x.clone() for x in self.x]
        for s in self.stacks:
            s.g.fill_(-7.0)
            s.scratch.fill_(-7.0)

    def agree(self, values, expected):
        """Each row to TOLERANCE of its norm; what comes next is then expected of these values, so
        that errors of one operation are not laid to another."""
        for x, e in zip(values, expected, strict=True):
            found = exact(x)
            error = (found - e).flatten(1).norm(dim=1)
            size = e.flatten(1).norm(dim=1)
            assert (error <= TOLERANCE * size).all(), (error / size).tolist()
            e.copy_(found)
