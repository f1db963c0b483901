"""AdamW, or NAdamW with use_nadam: the baseline that sets the targets of the minis."""

from algoperf_shampoo.optim import AdamW
from algoperf_shampoo.submission import Submission, common_settings

FIELDS = ("common",)


def make_optimizer(params, point, process_group):
    return AdamW(params, **common_settings(point))


_submission = Submission(make_optimizer, FIELDS)
get_batch_size = _submission.get_batch_size
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
