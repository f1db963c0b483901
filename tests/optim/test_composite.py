"""The rules with switches that the table of implementations uses start from the references."""

from functools import partial

import pytest

from algoperf_shampoo.optim.reference import Hyperparameters, ShampooGrafting
from algoperf_shampoo.optim.reference_kl import KLSOAP, KLShampoo
from algoperf_shampoo.optim.reference_shampoo import Shampoo
from algoperf_shampoo.optim.reference_soap import SOAP
from benchmarks import separated
from benchmarks.composite import KL_SHAMPOO, KL_SOAP, Composite
from benchmarks.other_shampoos import GraftedShampoo, UngraftedShampoo

from .test_identities import relative, walk

BASES = {
    "soap": (SOAP, partial(Composite)),
    "kl_soap": (KLSOAP, partial(Composite, **KL_SOAP)),
    "kl_shampoo": (KLShampoo, partial(Composite, **KL_SHAMPOO)),
    "shampoo": (Shampoo, UngraftedShampoo),
    "shampoo_grafting": (ShampooGrafting, GraftedShampoo),
}


@pytest.mark.parametrize("F", [1, 8])
@pytest.mark.parametrize("name", BASES)
def test_without_switches_it_is_the_reference(name, F):
    reference, with_switches = BASES[name]
    h = Hyperparameters(alpha=0.01, beta2=0.95, weight_decay=0.1, F=F)
    gradients = list(separated.gradients((5, 4), 40, seed=1))
    start = separated.start((5, 4), 0)
    ours = walk(with_switches(h), (5, 4), gradients) - start
    assert relative(ours, walk(reference(h), (5, 4), gradients) - start) < 1e-12
