"""Shampoo with Adam grafting, its inverse roots recomputed every F steps.

The paper's baseline (F = 100), the winner of AlgoPerf's first external-tuning track: Algorithm 3 of
"Purifying Shampoo".
"""

from algoperf_shampoo.optim import Shampoo
from algoperf_shampoo.submission import Submission, kronecker_settings

FIELDS = "factors", "grafting_epsilon", "exponent_multiplier"


def make_optimizer(params, point, process_group):
    return Shampoo(
        params,
        grafting="adam",
        grafting_eps=point.grafting_epsilon,
        exponent_multiplier=point.exponent_multiplier,
        process_group=process_group,
        **kronecker_settings(point),
    )


_submission = Submission(make_optimizer, FIELDS)
get_batch_size = _submission.get_batch_size
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
