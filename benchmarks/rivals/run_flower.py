"""A contestant: Flower, its FedAvg strategy and its simulation with Ray actors.

A server's evaluation, which evaluates nothing, marks the end of each round.
"""

import os
from pathlib import Path

import numpy as np

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # before flwr is imported
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.common.contest import Marks, arguments, finish, load
from benchmarks.common.contest_torch import local


def client_app(job: Path, threads: int) -> ClientApp:
    """Trains the client of the node that it runs for, on a model that the actor keeps."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(threads)
        here = local(job)
        arrived = message.content["arrays"].to_torch_state_dict()
        here.module.load_state_dict(arrived)
        here.train(int(context.node_config["partition-id"]))
        counted = MetricRecord({"num-examples": here.work.examples})
        sent = {"arrays": ArrayRecord(here.module.state_dict()), "metrics": counted}
        return Message(content=RecordDict(sent), reply_to=message)

    return app


def main() -> None:
    parser = arguments()
    parser.add_argument("--actors", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="of each actor")
    args = parser.parse_args()
    job = load(args.job)
    marks, last = Marks(), dict(job.start)
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        def ended(round: int, arrays: ArrayRecord) -> None:
            if round:
                marks.round()

        start = {name: torch.from_numpy(value) for name, value in job.start.items()}
        result = FedAvg(fraction_evaluate=0.0, min_available_nodes=job.work.clients).start(
            grid, ArrayRecord(start), num_rounds=args.rounds, evaluate_fn=ended
        )
        last.update({k: np.asarray(v) for k, v in result.arrays.to_torch_state_dict().items()})

    cores = args.actors * args.threads
    run_simulation(
        server,
        client_app(args.job.resolve(), args.threads),
        num_supernodes=job.work.clients,
        backend_config={
            "client_resources": {"num_cpus": args.threads, "num_gpus": 0.0},
            "init_args": {"num_cpus": cores, "logging_level": "ERROR", "log_to_driver": False},
        },
    )
    finish(args.out, marks, last, ("flwr", "ray", "torch", "numpy"))


if __name__ == "__main__":
    main()
