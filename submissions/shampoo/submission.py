"""Shampoo without grafting, its inverse roots recomputed every F steps.

Eq. 5 of "Purifying Shampoo": exponent -1/4 per factor of a matrix, -1/(2k) for order k.
"""

from algoperf_shampoo.optim import Shampoo
from algoperf_shampoo.submission import Submission, kronecker_settings

FIELDS = ("factors",)


def make_optimizer(params, point, process_group):
    return Shampoo(params, grafting=None, process_group=process_group, **kronecker_settings(point))


_submission = Submission(make_optimizer, FIELDS)
get_batch_size = _submission.get_batch_size
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
