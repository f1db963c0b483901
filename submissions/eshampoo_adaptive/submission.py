"""EShampoo whose eigenbases are refreshed when Eq. 11 exceeds tau, checked every F steps.

The paper's C^EShampoo (tau = 0.1, F = 50): Algorithm 2 of "Purifying Shampoo".
"""

from algoperf_shampoo.optim import eshampoo
from algoperf_shampoo.submission import Submission, hyperparameter, kronecker_settings


def make_optimizer(params, hyperparameters, process_group):
    return eshampoo(
        params,
        tau=hyperparameter(hyperparameters, "tau"),
        process_group=process_group,
        **kronecker_settings(hyperparameters),
    )


_submission = Submission(make_optimizer)
get_batch_size = _submission.get_batch_size
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
