"""A contestant: pfl, its FederatedAveraging on its SimulatedBackend, in one process or several.

Several processes are started by torchrun. pfl shuffles no user's data, so the function that makes
a user's dataset does: everybody here visits the examples in a new order in each round.
"""

import os

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor

from benchmarks.common.contest import Marks, arguments, finish
from benchmarks.common.contest_torch import Local, arrays, mean_loss


class Watch(TrainingProcessCallback):
    """Marks the end of each round."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.marks.round()
        return False, Metrics()


class Learner(torch.nn.Module):
    """A module with the two methods that pfl asks for."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return mean_loss(self.net(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict:
        return {}


def main() -> None:
    parser = arguments()
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    local = Local(args.job)
    work = local.work
    users = range(work.clients)
    sampler = get_user_sampler("minimize_reuse", users)  # everybody, once in each round
    data = FederatedDataset(lambda user: PyTorchTensorDataset(local.shuffled(user)), sampler)
    params = NNAlgorithmParams(
        central_num_iterations=args.rounds,
        evaluation_frequency=args.rounds + 1,
        train_cohort_size=work.clients,
        val_cohort_size=0,
    )
    local_params = NNTrainHyperParams(
        local_batch_size=work.batch, local_num_epochs=1, local_learning_rate=work.lr
    )
    central = torch.optim.SGD(local.params, lr=1.0)
    marks = Marks()
    FederatedAveraging().run(
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=PyTorchModel(Learner(local.module), torch.optim.SGD, central),
        algorithm_params=params,
        model_train_params=local_params,
        callbacks=[Watch(marks)],
    )
    if os.environ.get("RANK", "0") == "0":
        finish(args.out, marks, arrays(local.module), ("pfl", "torch", "numpy"))


if __name__ == "__main__":
    main()
