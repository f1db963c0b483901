"""EShampoo whose eigenbases are refreshed when Eq. 11 exceeds tau, checked every F steps.

The paper's C^EShampoo (tau = 0.1, F = 50): Algorithm 2 of "Purifying Shampoo".
"""

from algoperf_shampoo.optim import EShampoo
from algoperf_shampoo.submission import Submission, eshampoo_settings

FIELDS = (
    "factors", "tau", "noise_directions", "noise_level", "ablations", "schedule",
    "grafting", "grafting_epsilon",
)  # fmt: skip


def make_optimizer(params, point, process_group):
    return EShampoo(
        params,
        tau=point.tau,
        process_group=process_group,
        **eshampoo_settings(point),
    )


_submission = Submission(make_optimizer, FIELDS)
get_batch_size = _submission.get_batch_size
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
