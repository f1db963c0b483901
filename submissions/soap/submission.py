"""SOAP as its authors run it: Adam in Shampoo's eigenbasis, one QR iteration every F steps.

Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam" (2025).
"""

from algoperf_shampoo.optim import SOAP
from algoperf_shampoo.submission import Submission, kronecker_settings

FIELDS = ("iterated",)


def make_optimizer(params, point, process_group):
    return SOAP(params, process_group=process_group, **kronecker_settings(point))


_submission = Submission(make_optimizer, FIELDS)
get_batch_size = _submission.get_batch_size
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
