"""What launchers say in their variables."""

import re

import pytest
import torch

import vecfl.mesh
from vecfl.errors import InputError
from vecfl.launch import Launch, launched, threads_given
from vecfl.mesh import settled

MEET = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MEET}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
FOUND = Launch(3, 4, 1, "node0:29500", 0)


@pytest.mark.parametrize(
    "env, found",
    [
        ({}, None),
        (TORCHRUN, FOUND),
        (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}, Launch(3, 4, 1, "node0:29500", 2)),
        (OPEN_MPI | MEET, FOUND),
        (SLURM | MEET, FOUND),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", **MEET}, Launch(3, 4, None, "node0:29500", 0)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MEET}, None),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, None),
        (SLURM, None),  # the script of a job, which is one process
        (TORCHRUN | SLURM | {"SLURM_PROCID": "0"}, FOUND),  # torchrun inside a Slurm job
        (OPEN_MPI | MEET | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, FOUND),
    ],
    ids=["alone", "torchrun", "restarted", "open mpi", "slurm", "pmi", "one", "one task"]
    + ["slurm script", "torchrun in slurm", "mpi in slurm"],
)
def test_launchers(env: dict[str, str], found: Launch | None) -> None:
    assert launched(env) == found


@pytest.mark.parametrize(
    "env, line",
    [
        (
            SLURM | {"SLURM_STEP_ID": "0"},
            "Slurm started 4 ranks, but MASTER_ADDR is not set: export MASTER_ADDR, the host of "
            "rank 0, and MASTER_PORT, a free port there (unset SLURM_NTASKS where each process is "
            "a run of its own)",
        ),
        (OPEN_MPI | {"MASTER_ADDR": "node0"}, "MPI started 4 ranks, but MASTER_PORT is not set: "),
        ({"WORLD_SIZE": "2"}, "RANK=None, WORLD_SIZE=2: set both or none"),
        (
            TORCHRUN | {"RANK": "4"},
            "RANK=4, WORLD_SIZE=4, LOCAL_RANK=1: expected a rank, from 0, and a greater number of "
            "ranks",
        ),
        (TORCHRUN | {"RANK": "one"}, "RANK=one, WORLD_SIZE=4, LOCAL_RANK=1: expected a rank"),
    ],
    ids=["no address", "no port", "no rank", "too great", "no number"],
)
def test_variables_that_are_refused(env: dict[str, str], line: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(line)}"):
        launched(env)


def test_ranks_share_the_cores_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 2 on a, bound to other cores of it; 1, 3 and 4 on b, where they may all run."""
    beside = [("a", [0, 1, 2]), ("b", [*range(8)]), ("a", [2, 3])] + [("b", [*range(8)])] * 2
    threads: list[int] = []

    def gather(found: list[object], mine: object) -> None:
        found[:] = beside

    monkeypatch.setattr(vecfl.mesh.dist, "all_gather_object", gather)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    found = [settled(rank, 5, None) for rank in range(5)]
    assert [mesh.local for mesh in found] == [0, 0, 1, 1, 2]
    assert threads == [2, 2, 2, 2, 2]  # of 4 cores on a, of 8 on b
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    settled(0, 5, None)
    assert len(threads) == 5


def test_whose_number_of_threads_it_is(tmp_path) -> None:
    """torchrun sets OMP_NUM_THREADS=1 for its ranks where it was started without."""
    import os
    import subprocess
    import sys

    torchrun = {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}
    assert not threads_given({}, 0)
    assert threads_given({"OMP_NUM_THREADS": "1"}, 0)  # no torchrun
    assert threads_given(torchrun | {"OMP_NUM_THREADS": "4"}, 0)
    bare = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    for env, given in ((bare, False), (bare | {"OMP_NUM_THREADS": "1"}, True)):
        command = [sys.executable, "-c", "print(flush=True), input()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, env=env, **pipes) as parent:
            parent.stdout.readline()  # before that it may still be a fork of this process
            assert threads_given(torchrun, parent.pid) == given
            parent.communicate(b"\n")
    assert not threads_given(torchrun, parent.pid)  # it has ended, nobody can tell
