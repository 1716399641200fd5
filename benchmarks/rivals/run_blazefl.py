"""A contestant: BlazeFL, its FedAvg server with its pool of client threads or of processes.

Its FedAvg trainers make a model and a DataLoader for each client; the two here, on its public
classes, keep a model for each worker and train as fast as the plain loop.
"""

import argparse
import multiprocessing
import queue
import threading

import torch
from blazefl.contrib.fedavg import (
    FedAvgBaseServerHandler,
    FedAvgDownlinkPackage,
    FedAvgProcessPoolUplinkPackage,
    FedAvgUplinkPackage,
)
from blazefl.core import (
    IPCMode,
    ProcessPoolClientTrainer,
    SHMHandle,
    ThreadPoolClientTrainer,
    deserialize_model,
    serialize_model,
)

from benchmarks.common.contest import Marks, arguments, finish
from benchmarks.common.contest_torch import Local, arrays, local


class Server(FedAvgBaseServerHandler):
    """BlazeFL's FedAvg server; everybody comes to each round."""

    def __init__(self, here: Local, rounds: int) -> None:
        self.here = here
        super().__init__(
            model_selector=self,
            model_name=here.work.model,
            dataset=None,  # for evaluation, which does not happen here
            global_round=rounds,
            num_clients=here.work.clients,
            sample_ratio=1.0,
            device="cpu",
            batch_size=here.work.batch,
            seed=0,
        )

    def select_model(self, model_name: str) -> torch.nn.Module:
        return self.here.module


class Threads(ThreadPoolClientTrainer[FedAvgUplinkPackage, FedAvgDownlinkPackage]):
    """Client threads; each takes a free model, trains and puts it back."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.num_parallels, self.device = args.workers, "cpu"
        self.cache: list[FedAvgUplinkPackage] = []
        self.stop_event = threading.Event()
        self.free: queue.SimpleQueue[Local] = queue.SimpleQueue()
        for _ in range(args.workers):
            self.free.put(Local(args.job))

    def worker(
        self, cid: int, device: str, payload: FedAvgDownlinkPackage, stop_event: threading.Event
    ) -> FedAvgUplinkPackage:
        here = self.free.get()
        deserialize_model(here.module, payload.model_parameters)
        here.train(cid)
        package = FedAvgUplinkPackage(cid, serialize_model(here.module), here.work.examples)
        self.free.put(here)
        return package

    def uplink_package(self) -> list[FedAvgUplinkPackage]:
        packages, self.cache = self.cache, []
        return packages


class Processes(
    ProcessPoolClientTrainer[FedAvgProcessPoolUplinkPackage, FedAvgDownlinkPackage, tuple]
):
    """Client processes, forked for each round; updates come back in shared memory."""

    ipc_mode = IPCMode.SHARED_MEMORY

    def __init__(self, args: argparse.Namespace) -> None:
        self.num_parallels, self.device = args.workers, "cpu"
        self.cache: list[FedAvgProcessPoolUplinkPackage] = []
        self.args, self.manager = args, multiprocessing.Manager()
        self.stop_event = self.manager.Event()
        self.parameters = serialize_model(local(args.job).module)  # made before the fork

    def get_client_config(self, cid: int) -> tuple:
        return self.args.job, cid

    def prepare_uplink_package_buffer(self) -> FedAvgProcessPoolUplinkPackage:
        return FedAvgProcessPoolUplinkPackage(-1, self.parameters.clone(), 0)

    @staticmethod
    def worker(
        config: tuple,
        payload: FedAvgDownlinkPackage,
        device: str,
        stop_event: threading.Event,
        *,
        shm_buffer: FedAvgProcessPoolUplinkPackage | None = None,
    ) -> FedAvgProcessPoolUplinkPackage:
        job, cid = config
        here = local(job)
        deserialize_model(here.module, payload.model_parameters)
        here.train(cid)
        assert shm_buffer is not None
        shm_buffer.model_parameters.copy_(serialize_model(here.module))
        return FedAvgProcessPoolUplinkPackage(cid, SHMHandle(), here.work.examples)

    def uplink_package(self) -> list[FedAvgProcessPoolUplinkPackage]:
        packages, self.cache = self.cache, []
        return packages


def main() -> None:
    parser = arguments()
    parser.add_argument("--pool", choices=("threads", "processes"), required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="of each worker")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    server = Server(Local(args.job), args.rounds)
    trainer = Threads(args) if args.pool == "threads" else Processes(args)
    marks = Marks()
    while not server.if_stop():
        trainer.local_process(server.downlink_package(), server.sample_clients())
        for package in trainer.uplink_package():
            server.load(package)
        marks.round()
    finish(args.out, marks, arrays(server.model), ("blazefl", "torch", "numpy"))


if __name__ == "__main__":
    main()
