"""AdamW, or NAdamW with use_nadam: the baseline that sets the targets of the minis."""

from algoperf_shampoo.optim import adamw
from algoperf_shampoo.submission import Submission, common_settings


def make_optimizer(params, hyperparameters, process_group):
    return adamw(params, **common_settings(hyperparameters))


_submission = Submission(make_optimizer)
get_batch_size = _submission.get_batch_size
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
