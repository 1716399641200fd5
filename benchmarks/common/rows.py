"""Rows of results: one JSON object a line, each with where and from what it was measured."""

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.apart import family, resident

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, object]


def write(path: Path, row: Mapping[str, object]) -> None:
    """Add a row to the file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile of `seconds`, in milliseconds."""
    low, median, high = np.percentile(seconds, (20, 50, 80)) * 1e3
    return {"p20_ms": round(low, 3), "p50_ms": round(median, 3), "p80_ms": round(high, 3)}


def peak_mib() -> float:
    """The highest resident memory of this process so far, and what its forks have of their own."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    own = "Private_Clean:", "Private_Dirty:"  # all else is counted here already
    forks = sum(resident(pid, *own) for pid in family(os.getpid()))
    return (mine + forks * 1024) / 2**20


def provenance() -> Row:
    """Processor, cores, versions, commit and date."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(": ")[1] for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": str(date.today()),
    }


def commit() -> str:
    """The commit, and whether the tree has changed since, but for what benchmarks write."""
    git = ("git", "-C", str(ROOT))
    name = output(*git, "describe", "--always")
    written = (":!benchmarks/results", ":!docs/benchmarks.md", ":!docs/benchmarks")
    changed = output(*git, "diff", "--name-only", "HEAD", "--", ".", *written)
    if not name:
        return os.environ.get("COMMIT", "unknown")  # a copied tree knows no commit
    return f"{name}-dirty" if changed else name


def gpu_provenance(device: str) -> Row:
    """`provenance`, and for a CUDA device its name, the driver and the version of CUDA."""
    if device == "cpu":
        return provenance()
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    gpu = {"gpu": torch.cuda.get_device_name(), "driver": driver.splitlines()[0] if driver else ""}
    return gpu | {"cuda": torch.version.cuda} | provenance()


def output(*command: str) -> str:
    """What a command prints; empty if it fails or is not there."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
