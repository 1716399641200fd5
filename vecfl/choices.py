"""Choices that were measured, kept for the next run: one JSON file in the user's cache folder."""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vecfl.files import atomic_file

Facts = Mapping[str, object]  # what a choice depends on
log = logging.getLogger("vecfl")


def choices_file() -> Path:
    """`$XDG_CACHE_HOME/vecfl/choices.json`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vecfl/choices.json"


def machine(device: torch.device) -> dict[str, object]:
    """What decides how fast this machine is."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu, "torch": torch.__version__}


def key(facts: Facts) -> str:
    """A name for the facts."""
    text = json.dumps(facts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def recall(facts: Facts) -> Any:
    """The choice that was kept for these facts, or None."""
    try:
        return _read().get(key(facts))
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): measuring anew", choices_file(), error)
        return None


def keep(facts: Facts, choice: Mapping[str, object]) -> str:
    """Keep a choice for these facts; says where it is kept, or why it is not."""
    kept: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # `recall` has told
        kept = _read()
    try:
        choices_file().parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(choices_file()) as file:
            file.write(json.dumps(kept | {key(facts): choice}, indent=1).encode())
    except OSError as error:
        return f"not kept: {error.filename or choices_file()}: {error.strerror or error}"
    return f"kept in {choices_file()}"


def _read() -> dict[str, Any]:
    try:
        kept = json.loads(choices_file().read_text(encoding="utf-8"))
        return kept if isinstance(kept, dict) else {}
    except FileNotFoundError:
        return {}
