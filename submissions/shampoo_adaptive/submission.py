"""Shampoo without grafting, kept as eigenvectors and eigenvalues, Eq. 11 deciding on the vectors.

Appendix B of "Purifying Shampoo": where the criterion holds, eigenvalues become diag(Q'LQ).
"""

from algoperf_shampoo.optim import ShampooAdaptive
from algoperf_shampoo.submission import Submission, grafting_settings, kronecker_settings

FIELDS = "factors", "tau", "grafting", "grafting_epsilon"


def make_optimizer(params, point, process_group):
    return ShampooAdaptive(
        params,
        tau=point.tau,
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
