"""Shampoo^2 scaled by its trace, without grafting: S^-1 C^Shampoo2.

Section 3 of "Purifying Shampoo": exponent -1/2 per factor, S = Tr(L) = Tr(R).
"""

from algoperf_shampoo.optim import Shampoo2Trace
from algoperf_shampoo.submission import Submission, grafting_settings, kronecker_settings

FIELDS = "factors", "trace_scale", "grafting", "grafting_epsilon"


def make_optimizer(params, point, process_group):
    return Shampoo2Trace(
        params,
        trace_scale=point.trace_scale,
        process_group=process_group,
        **kronecker_settings(point),
        **grafting_settings(point),
    )


_submission = Submission(make_optimizer, FIELDS)
get_batch_size = _submission.get_batch_size
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
