"""EShampoo whose eigenbases are all refreshed every F steps.

The paper's C^EShampoo (F = 100): Algorithm 2 of "Purifying Shampoo" without Eq. 11.
"""

from algoperf_shampoo.optim import EShampoo
from algoperf_shampoo.submission import Submission, eshampoo_settings

FIELDS = (
    "factors", "noise_directions", "noise_level", "ablations", "grafting", "grafting_epsilon",
)  # fmt: skip


def make_optimizer(params, point, process_group):
    return EShampoo(params, process_group=process_group, **eshampoo_settings(point))


_submission = Submission(make_optimizer, FIELDS)
get_batch_size = _submission.get_batch_size
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
