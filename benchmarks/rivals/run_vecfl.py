"""A contestant: vecfl, which measures for itself how to run."""

import torch

import vecfl
from benchmarks.common.contest import Marks, arguments, finish, load
from benchmarks.common.contest_torch import module


def main() -> None:
    args = arguments().parse_args()
    job = load(args.job)
    work = job.work
    columns = {"x": torch.from_numpy(job.x), "y": torch.from_numpy(job.y)}
    offsets = torch.arange(0, work.clients * work.examples + 1, work.examples)
    data = vecfl.FederatedDataset({k: v.flatten(0, 1) for k, v in columns.items()}, offsets)
    task = vecfl.Task(module(work, job.start), vecfl.cross_entropy, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=work.lr, batches=vecfl.Batches(work.batch))
    marks = Marks()
    sim = vecfl.Simulation(
        task,
        data,
        algorithm,
        vecfl.everyone(),
        backend="auto",
        workers="auto",
        slots="auto",
    )
    state = sim.start()
    for _ in range(args.rounds):
        state, metrics = sim.round(state)
        marks.round()
    assert metrics["system/client_steps"] == work.steps and not metrics["train/dropped_clients"]
    ran = " ".join(f"{k} {metrics[f'system/{k}']}" for k in ("backend", "workers", "slots"))
    model = {name: p.numpy() for name, p in sim.state_dict(state).items()}
    finish(args.out, marks, model, ("torch", "numpy"), ran=ran)


if __name__ == "__main__":
    main()
