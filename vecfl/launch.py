"""What the launcher of several ranks says in its environment variables: torchrun, MPI or Slurm."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vecfl.errors import InputError

# The variables of rank, number of ranks, and rank on the machine; the first launcher that set some.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "PMI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
Environment = Mapping[str, str]


@dataclass(frozen=True)
class Launch:
    """Rank `rank` of `size`, which meet at `address`; `local` on its machine (None: not said).

    restarts  of the ranks by torchrun; on several machines each of them counts its own
    """

    rank: int
    size: int
    local: int | None
    address: str
    restarts: int


def launched(env: Environment) -> Launch | None:
    """What the launcher says; None for a process that was started alone.

    Slurm's variables count inside `srun`, or where MASTER_ADDR is given: the script of a job, which
    runs once, has them too. Raises InputError for what is no rank, and without a place to meet.
    """
    for launcher, names in LAUNCHERS.items():
        rank, size, local = (env.get(name) for name in names)
        if launcher == "torchrun" and (rank is None) != (size is None):
            raise InputError(f"{names[0]}={rank}, {names[1]}={size}: set both or none")
        if launcher == "Slurm" and not {"SLURM_STEP_ID", "MASTER_ADDR"} & env.keys():
            continue
        if rank is None or size is None:
            continue
        values = (rank, size, "0" if local is None else local)
        if not all(value.isdecimal() for value in values) or not int(rank) < int(size):
            said = ", ".join(f"{name}={env[name]}" for name in names if name in env)
            raise InputError(f"{said}: expected a rank, from 0, and a greater number of ranks")
        if int(size) == 1:
            return None
        address = meeting(env, launcher, size, names[1])
        restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
        return Launch(
            int(rank), int(size), None if local is None else int(local), address, restarts
        )
    return None


def meeting(env: Environment, launcher: str, size: str, name: str) -> str:
    """Where the ranks meet, host:port."""
    for needed in ("MASTER_ADDR", "MASTER_PORT"):
        if needed not in env:
            raise InputError(
                f"{launcher} started {size} ranks, but {needed} is not set: export MASTER_ADDR, "
                f"the host of rank 0, and MASTER_PORT, a free port there (unset {name} where each "
                "process is a run of its own)"
            )
    return f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"


def threads_given(env: Environment, parent: int) -> bool:
    """Whether the user has set OMP_NUM_THREADS; torchrun, the process `parent`, sets it to 1."""
    if env.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in env:
        return "OMP_NUM_THREADS" in env
    try:  # what torchrun itself was started with
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path(f"/proc/{parent}/environ").read_bytes()
    except OSError:
        return False
