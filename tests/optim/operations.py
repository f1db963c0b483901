"""What rules compute on stacks, as a vocabulary that tests speak to every back end alike.

:class:`Machine` hands each operation to a back end (a subclass of :class:`~.ops.Operations`) and
does the same in float64 beside it, row by row, with the functions of :mod:`.reference`. After any
operation the two must agree.
"""

import torch

from algoperf_shampoo.optim.blocks.factors import build_factor_sets
from algoperf_shampoo.optim.blocks.layout import Layout
from algoperf_shampoo.optim.blocks.partition import cut
from algoperf_shampoo.optim.gpu.triton_ops import TritonOperations
from algoperf_shampoo.optim.ops import Hyper, Operations, State
from algoperf_shampoo.optim.reference import from_basis, matricize, mode_product, to_basis

# Orders 1 to 4; one row, and three.
SHAPES = [(12,), (9, 7), (9, 7), (9, 7), (20, 5), (7, 3, 8), (3, 8, 3, 7)]
BETA1, BETA2, EPS = 0.9, 0.99, 1e-12
TOLERANCE = 2e-6
MODES = 4


def exact(x):
    return x.detach().double().cpu().clone()


def scaled(x, vectors, skip=None):
    """x [d_1, ..., d_k] times the vectors of its modes."""
    for mode, v in enumerate(vectors):
        if mode != skip:
            x = x * v.view([-1 if i == mode else 1 for i in range(x.ndim)])
    return x


def limit(d):
    """What lambda^-1/2 does not exceed: some of the vectors' entries do."""
    return 1.0 + d / 20


def shares(x):
    """Roots of mean squares [B, d] as parts of each row's largest, or they grow without bound."""
    return (x / x.amax(1, keepdim=True)).sqrt()


def root(lam):
    return (lam**-0.5).clamp(max=limit(lam.shape[-1]))


class Machine:
    """``self.x`` is the current value, made of the gradients; ``self.expected`` in float64.

    Args:
        back_end: "fresh" (by torch, in memory taken anew), "torch" (in buffers) or "kernels".
    """

    def __init__(self, device, back_end, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        params = [torch.nn.Parameter(torch.zeros(s, device=device)) for s in SHAPES]
        self.layout = Layout(params, lambda p: cut(tuple(p.shape), 20))
        self.stacks = self.layout.stacks
        build_factor_sets(self.stacks)
        moments = ("exp_avg", "exp_avg_sq")
        self.layout.allocate(lambda stack: moments, lambda stack: 2, lambda stack: {"scales": 1.0})
        if back_end == "fresh":
            for s in self.stacks:
                s.work.clear()
        if back_end == "kernels":
            self.ops = TritonOperations(self.stacks)
        else:
            self.ops = Operations()
        corrections = {}
        for s in self.stacks:
            s.ready = [True] * len(s)
            for q in s.operators:
                q.copy_(torch.linalg.qr(self.draw(q.shape)).Q)
            for v in s.vectors["scales"]:
                v.copy_(self.draw(v.shape).exp())
            rows = torch.arange(len(s), device=device).view(-1, *[1] * len(s.shape)) / 50
            corrections[id(s)] = 0.3 + rows, 0.2 + rows
        self.h = Hyper(0.0, BETA1, BETA2, EPS, 0.0, True, "highest", corrections)
        self.m = [exact(s.state["exp_avg"]) for s in self.stacks]
        self.v = [exact(s.state["exp_avg_sq"]) for s in self.stacks]
        self.vectors = [[exact(v) for v in s.vectors["scales"]] for s in self.stacks]
        self.factors = [[exact(f) for f in s.factors] for s in self.stacks]
        self.gradient()

    def draw(self, shape):
        return torch.randn(shape, generator=self.random)

    def gradient(self):
        """New gradients, of another size in every row; a new section of a step begins."""
        for s in self.stacks:
            for row in s.g:
                row.copy_(self.draw(s.shape) * 10 ** self.draw(()).item())
        self.ops.gradients_gathered(self.stacks)
        self.ops.begin()
        self.state = State(self.stacks)
        self.x = self.ops.gradients(self.stacks, kept=False)
        self.expected = [exact(x) for x in self.x.tensors()]

    def gram(self):
        """factor <- 0.5 factor + 0.25 X X'."""
        self.ops.gram_ema(self.x, 0.5, 0.25)
        self._expect_gram(range(MODES), mean=False)

    def gram_of_modes(self):
        """The same one mode at a time, a quarter of the mean; x is there afterwards."""
        for mode in range(MODES):
            self.ops.gram_ema(self.x, 0.5, 0.25, mode=mode, mean=True)
        self._expect_gram(range(MODES), mean=True)
        self.agree(self.x, self.expected)

    def gram_of_state(self):
        """Of what is in no buffer: M."""
        self.ops.gram_ema(self.state["exp_avg"], 0.5, 0.25)
        kept, self.expected = self.expected, self.m
        self._expect_gram(range(MODES), mean=False)
        self.expected = kept

    def _expect_gram(self, modes, mean):
        for s, factors, xs in zip(self.stacks, self.factors, self.expected, strict=True):
            for mode, factor in enumerate(factors):
                if mode in modes:
                    for row, x in enumerate(xs):
                        X = matricize(x, mode)
                        weight = 0.25 / X.shape[1] if mean else 0.25
                        factor[row] = 0.5 * factor[row] + weight * X @ X.T
            for mine, factor in zip(s.factors, factors, strict=True):
                self._agree([mine], [factor])

    def _bases(self, s, row):
        return [exact(q[row]) for q in s.operators]

    def _rowwise(self, function, values=None):
        """function(x, bases, vectors) of every row."""
        return [
            torch.stack(
                [function(x, self._bases(s, r), [v[r] for v in vs]) for r, x in enumerate(xs)]
            )
            for s, xs, vs in zip(self.stacks, values or self.expected, self.vectors, strict=True)
        ]

    def rotate(self):
        self.expected = self._rowwise(lambda x, bases, _: to_basis(x, bases))
        self.x = self.ops.rotate(self.x, self.state.bases)
        self.agree(self.x, self.expected)

    def rotate_by_roots(self):
        """Operators that are not orthogonal, a thousand times the bases."""
        for s in self.stacks:
            for q in s.operators:
                q.mul_(1e3)
        self.expected = self._rowwise(lambda x, bases, _: to_basis(x, bases))
        self.x = self.ops.rotate(self.x, State(self.stacks, orthogonal=False).roots)
        self.agree(self.x, self.expected)
        for s in self.stacks:
            for q in s.operators:
                q.div_(1e3)

    def rotate_but_one(self):
        """Of a copy, all modes but one, and scaled, as KL-Shampoo's factors want it."""
        with self.x.held():
            for skip in range(MODES):
                self._rotate_but(skip)
        self.agree(self.x, self.expected)

    def _rotate_but(self, skip):
        scales = self.state.vectors("scales")
        y = self.ops.rotate(self.ops.copy(self.x), self.state.bases, skip=skip, scale=scales)
        expected = self._rowwise(lambda x, bases, v: self._but_one(x, bases, v, skip))
        self.agree(y, expected)
        back = self.ops.rotate_back(y, self.state.bases, skip=skip)
        apply = lambda x, bases, v: self._but_one(x, [q.T for q in bases], None, skip)  # noqa: E731
        self.agree(back, self._rowwise(apply, expected))

    def learn(self):
        """As KL-Shampoo's factors and eigenvalues: each mode's factor learns x as it is in the
        bases of all others, scaled; x becomes the rotated one, mode by mode."""
        vectors = self.state.vectors("scales")
        scale = self.ops.inverse_sqrt(vectors, limit)
        roots = [[root(v) for v in vs] for vs in self.vectors]
        for mine, expected in zip(scale.vectors, roots, strict=True):
            self._agree(mine, expected)
        with self.ops.accurate():
            with self.x.held():
                for i in range(MODES, 1, -1):
                    X = self.ops.rotate(self.x, self.state.bases, skip=-i, keep=True)
                    assert [len(s.shape) for s in X.stacks] == [
                        len(s.shape) for s in self.stacks if len(s.shape) >= i
                    ]
                    self.ops.gram_ema(X, 0.5, 0.25, mode=-i, mean=True, scale=scale)
            self.agree(self.x, self.expected)
            X = self.ops.rotate(self.x, self.state.bases, skip=-1)
            self.ops.gram_ema(X, 0.5, 0.25, mode=-1, mean=True, scale=scale)
            self.x = self.ops.rotate(X, self.state.bases, only=-1)
        self._expect_gram_of_whitened(roots)
        self.expected = self._rowwise(lambda x, bases, _: to_basis(x, bases))
        self.agree(self.x, self.expected)
        self.ops.mean_square_ema(vectors, self.x, BETA2, scale, limit)
        self.agree(self.x, self.expected)
        self._expect_eigenvalues(roots)

    def _expect_gram_of_whitened(self, roots):
        for s, factors, xs, vs in zip(self.stacks, self.factors, self.expected, roots, strict=True):
            for mode, factor in enumerate(factors):
                for row, x in enumerate(xs):
                    mine = [v[row] for v in vs]
                    X = matricize(self._but_one(x, self._bases(s, row), mine, mode), mode)
                    factor[row] = 0.5 * factor[row] + 0.25 / X.shape[1] * X @ X.T
            for mine, factor in zip(s.factors, factors, strict=True):
                self._agree([mine], [factor])

    def _expect_eigenvalues(self, roots):
        for s, vs, rs, xs in zip(self.stacks, self.vectors, roots, self.expected, strict=True):
            for mode in range(len(s.shape)):
                rows = [
                    (matricize(scaled(x, [r[row] for r in rs], mode), mode) ** 2).mean(1)
                    for row, x in enumerate(xs)
                ]
                new = BETA2 * vs[mode] + (1 - BETA2) * torch.stack(rows)
                vs[mode] = new.clamp_min(1 / limit(new.shape[-1]) ** 2)
            self._agree(s.vectors["scales"], vs)

    def momentum(self):
        """x in the basis, and its average in units of the vectors' roots: those of before."""
        scale = self.ops.inverse_sqrt(self.state.vectors("scales"), limit)
        self.ops.momentum(self.x, self.state["exp_avg"], BETA1, scale, 0.01, 3.0)
        for i, (x, vs) in enumerate(zip(self.expected, self.vectors, strict=True)):
            self.m[i] = BETA1 * self.m[i] + (1 - BETA1) * x
            one = [
                scaled(torch.ones_like(row), [root(v[r]) for v in vs]) for r, row in enumerate(x)
            ]
            s = torch.stack(one)
            self.expected[i] = 3.0 * self.m[i] / (1 / s + 0.01)
        self._agree_moments()
        self.agree(self.x, self.expected)

    @staticmethod
    def _but_one(x, bases, vectors, skip):
        if skip >= x.ndim:
            return x
        for mode, q in enumerate(bases):
            x = x if mode == skip else mode_product(x, q.T, mode)
        return x if vectors is None else scaled(x, vectors, skip)

    def adam(self):
        self.ops.adam(self.x, self.state["exp_avg"], self.state["exp_avg_sq"], self.h)
        self._expect_adam(corrected=True)

    def adam_uncorrected(self):
        """With a factor for every row, as SOAP has them."""
        moments = self.state["exp_avg"], self.state["exp_avg_sq"]
        factors = [c1 for c1, _ in self.h.corrections.values()]
        self.ops.adam(self.x, *moments, self.h, corrected=False, factors=factors)
        self._expect_adam(corrected=False, factors=factors)

    def _expect_adam(self, corrected, factors=None):
        for i, s in enumerate(self.stacks):
            x = self.expected[i]
            self.m[i] = BETA1 * self.m[i] + (1 - BETA1) * x
            self.v[i] = BETA2 * self.v[i] + (1 - BETA2) * x**2
            c1, c2 = (c.double().cpu() for c in self.h.corrections[id(s)])
            c1, c2 = (c1, c2) if corrected else (torch.ones_like(c1), torch.ones_like(c2))
            numerator = (BETA1 * self.m[i] + (1 - BETA1) * x) / c1
            self.expected[i] = numerator / ((self.v[i] / c2).sqrt() + EPS)
            if factors is not None:
                self.expected[i] *= exact(factors[i])
        self._agree_moments()
        self.agree(self.x, self.expected)

    def _agree_moments(self):
        self._agree([s.state["exp_avg"] for s in self.stacks], self.m)
        self._agree([s.state["exp_avg_sq"] for s in self.stacks], self.v)

    def averages(self):
        """M and D learn x, which stays."""
        self.ops.ema(self.state["exp_avg"], self.x, BETA1)
        self.ops.ema(self.state["exp_avg_sq"], self.x, BETA2, square=True)
        for i, x in enumerate(self.expected):
            self.m[i] = BETA1 * self.m[i] + (1 - BETA1) * x
            self.v[i] = BETA2 * self.v[i] + (1 - BETA2) * x**2
        self._agree_moments()
        self.agree(self.x, self.expected)

    def mean_square(self):
        """The vectors of modes learn the mean squares of x, scaled by the other modes'."""
        for mode in range(MODES):
            scales = self.state.vectors("scales")
            found = self.ops.mean_square(self.x, mode, scale=scales)
            expected = []
            for s, xs, vs, mine in zip(
                self.stacks, self.expected, self.vectors, found, strict=True
            ):
                if mode >= len(s.shape):
                    assert mine is None
                    expected.append(None)
                    continue
                rows = [
                    (matricize(scaled(x, [v[r] for v in vs], mode), mode) ** 2).mean(1)
                    for r, x in enumerate(xs)
                ]
                expected.append(torch.stack(rows))
                self._agree([mine], [expected[-1]])
            self.ops.assign(scales, [None if x is None else shares(x) for x in found], mode)
            for vs, x in zip(self.vectors, expected, strict=True):
                if x is not None:
                    vs[mode] = shares(x)
            for s, vs in zip(self.stacks, self.vectors, strict=True):
                self._agree(s.vectors["scales"], vs)

    def scale_modes(self):
        self.ops.scale(self.x, self.state.vectors("scales"))
        self.expected = self._rowwise(lambda x, _, vectors: scaled(x, vectors))
        self.agree(self.x, self.expected)

    def normalize(self):
        """Every block to norm 3, by norm and scale."""
        self.ops.scale(self.x, [3 / n for n in self.ops.norm(self.x)])
        self.expected = self._rowwise(lambda x, *_: 3 * x / x.norm())
        self.agree(self.x, self.expected)

    def rotate_back(self):
        self.expected = self._rowwise(lambda x, bases, _: from_basis(x, bases))
        self.x = self.ops.rotate_back(self.x, self.state.bases)
        self.agree(self.x, self.expected)

    def deliver(self):
        """x is the direction: it stands in ``g``, and nowhere else."""
        self.ops.deliver(self.x)
        self._agree([s.g for s in self.stacks], self.expected)

    def move_moments(self):
        """exp_avg into its basis, mode by mode, and its rows by turns; between sections."""
        for i, s in enumerate(self.stacks):
            for mode in range(len(s.shape)):
                for rows in ([0], list(range(len(s)))):
                    for row in rows:
                        q = exact(s.operators[mode][row])
                        self.m[i][row] = mode_product(self.m[i][row], q.T, mode)
                    self.ops.rotate_mode_(s, s.state["exp_avg"], mode, rows, back=False)
        self._agree([s.state["exp_avg"] for s in self.stacks], self.m)

    def torch_scale(self, factor=4.0):
        """Plain torch on the current value."""
        with self.ops.write(self.x) as xs:
            for x in xs:
                x.mul_(factor)
        self.expected = [factor * x for x in self.expected]

    def copy(self):
        """The current value in other memory; where it was stands something else."""
        other = self.ops.copy(self.x)
        with self.ops.write(self.x) as xs:
            for x in xs:
                x.fill_(-7.0)
        self.x = other
        self.agree(self.x, self.expected)

    def copy_state(self):
        """M is the current value."""
        self.x = self.ops.copy(self.state["exp_avg"])
        self.expected = [x.clone() for x in self.m]
        self.agree(self.x, self.expected)

    def agree(self, value, expected):
        self._agree(value.tensors(), expected)

    def _agree(self, values, expected):
        """Each row to TOLERANCE of its norm; what comes next is then expected of these values, so
        that errors of one operation are not laid to another."""
        for x, e in zip(values, expected, strict=True):
            found = exact(x)
            error = (found - e).flatten(1).norm(dim=1)
            size = e.flatten(1).norm(dim=1)
            assert (error <= TOLERANCE * size).all(), (error / size).tolist()
            e.copy_(found)
