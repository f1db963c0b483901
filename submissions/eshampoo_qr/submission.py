"""EShampoo whose eigenbases are iterated by warm-started QR where Eq. 11 exceeds tau.

Algorithm 4 of "Purifying Shampoo", with its loop condition and the order of columns mended.
"""

from algoperf_shampoo.optim import EShampoo, Solver
from algoperf_shampoo.submission import Submission, eshampoo_settings

FIELDS = (
    "common", "iterated", "tau", "noise_directions", "noise_level", "ablations", "schedule",
    "max_qr_iterations", "grafting", "grafting_epsilon",
)  # fmt: skip


def make_optimizer(params, point, process_group):
    settings = eshampoo_settings(point)
    workspace = settings.pop("eigen_workspace_mib")
    iterations = point.max_qr_iterations
    solver = Solver(method="qr", max_iterations=iterations, workspace_mib=workspace)
    return EShampoo(
        params,
        tau=point.tau,
        eigensolver=solver,
        process_group=process_group,
        **settings,
    )


_submission = Submission(make_optimizer, FIELDS)
get_batch_size = _submission.get_batch_size
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
