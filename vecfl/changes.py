"""Which settings of a run may be others when it goes on, and which change its result."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vecfl.arrangement import Arrangement
from vecfl.plugins import digests

# What a run may be resumed with although it was begun otherwise: the rounds stay what they are.
OF_THIS_START = {"resume", "resume_changed", "out", "profile"}
FREE = OF_THIS_START | {"track", "checkpoint_every", "keep", "safetensors", "client_results"}
FREE |= {"stop_at", "stop_at_epsilon", "patience", "table"}  # the rows of another table are refused
# They say when it may fall back, and when a learning rate may.
FREE_UNLESS_SEEN = {"rounds", "eval_every", "test_every", "initial_evaluation"}
FREE_UNLESS_SEEN |= {"watch", "statistics", "metrics"}
# Taken from the checkpoint, but for the precision, which is a part of the result.
ARRANGEMENT = {field.name for field in fields(Arrangement)} - {"precision"}


def changes(there: Mapping[str, Any], here: Mapping[str, Any], looks: bool = False) -> list[str]:
    """The settings that differ and change the result, as "lr 0.1 there, 0.2 here".

    looks  whether the algorithm sees metrics, which then decide the rounds, as in a fall back
    """
    free = without_effect(there, here, looks)
    # older versions had no other precision
    there, here = ({"precision": "float32"} | dict(one) for one in (there, here))
    return [
        f"{name} {there.get(name)} there, {here.get(name)} here"
        for name in {**there, **here}
        if name not in free and not same(name, there.get(name), here.get(name))
        if name in there or here[name]  # an older version had no such setting
    ]


def edited(
    files: Mapping[str, Mapping[str, str]], there: Mapping[str, Any], here: Mapping[str, Any]
) -> list[str]:
    """The files with parts of one's own that are not what they were, where that may matter.

    files  setting -> path -> SHA-256, as they were (`vecfl.plugins.digests`)
    """
    now, free = digests(here), without_effect(there, here)
    return [
        f"{name}: {path} has been edited"
        for name, known in files.items()
        for path, digest in known.items()
        if name not in free and now.get(name, {}).get(path, digest) != digest
    ]


def without_effect(
    there: Mapping[str, Any], here: Mapping[str, Any], looks: bool = False
) -> set[str]:
    """The settings that may change from one start of a run to the next."""
    looks = looks or bool(there.get("fall_back") or here.get("fall_back"))
    free = FREE | ARRANGEMENT | (set() if looks else FREE_UNLESS_SEEN)
    calibrated = there.get("epsilon") is not None  # the noise goes by the number of rounds
    return free - {"rounds"} if calibrated else free


def same(name: str, there: Any, here: Any) -> bool:
    """Whether two values of a setting are one."""
    if name == "init" and there is not None and here is not None:
        return Path(there).expanduser().resolve() == Path(here).expanduser().resolve()
    return bool(there == here)
