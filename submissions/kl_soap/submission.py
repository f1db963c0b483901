"""KL-SOAP as its authors run it: Adam in the eigenbasis of KL-Shampoo's factors.

Lin et al., "Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization" (2025).
"""

from algoperf_shampoo.optim import KLSOAP
from algoperf_shampoo.submission import Submission, kronecker_settings

FIELDS = "iterated", "eigenvalues", "eigenvalue_clamp"


def make_optimizer(params, point, process_group):
    return KLSOAP(
        params,
        eigenvalues=point.eigenvalues,
        clamp=point.eigenvalue_clamp,
        process_group=process_group,
        **kronecker_settings(point),
    )


_submission = Submission(make_optimizer, FIELDS)
get_batch_size = _submission.get_batch_size
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
