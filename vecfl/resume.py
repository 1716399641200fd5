"""Which run a command goes on with, and how its directory is made ready for that."""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from vecfl.arrangement import Arrangement
from vecfl.changes import ARRANGEMENT, OF_THIS_START, changes, edited, same
from vecfl.checkpoint import load, newest_good, rewind, rounds_in
from vecfl.cli import flag
from vecfl.errors import InputError
from vecfl.files import atomic_file
from vecfl.flags import RunArgs
from vecfl.mesh import join
from vecfl.stop import Stop
from vecfl.track import as_yaml, forget_clients, hold

log = logging.getLogger("vecfl")
Args = TypeVar("Args", bound=RunArgs)

CHECKPOINTS = "checkpoints"  # the folder in the directory of a run
TABLE = "table"  # likewise, where the rows of its clients lie there
FIRST = "first.pt"  # the first model, where parts of it do not train: no checkpoint has these
RESULTS = ("model.pt", "model.safetensors", "curves.png")  # what a finished run has


@dataclass(frozen=True)
class Before:
    """A run that is gone on with: its directory, and the content of a checkpoint."""

    run_dir: Path
    content: dict[str, Any]


def resume(args: Args, recipe: str) -> tuple[Args, Before | None]:
    """The run that `--resume` means, None to start one, and `args` with its arrangement.

    Call it with the values that decide the result filled in; of several ranks the first looks, and
    tells the others. Raises InputError where there is no whole checkpoint, and with the keys where
    settings that change the result are others than the run's, unless `--resume-changed` is there;
    then the arrangement is that of `args`, too.
    """
    return join().from_first(lambda: _resume(args, recipe))


def _resume(args: Args, recipe: str) -> tuple[Args, Before | None]:
    before = _find(args)
    if before is None:
        return args, None
    if before.content["recipe"] != recipe:
        raise InputError(f"--resume: {before.run_dir} is a run of {before.content['recipe']}")
    config, done = before.content["config"], before.content["run"]["round"]
    if args.rounds < done:
        raise InputError(f"--rounds: expected at least {done}, which are done, got {args.rounds}")
    here = asdict(args)
    different = changes(config, here) + edited(before.content.get("files", {}), config, here)
    if same("init", config.get("init"), args.init):
        first = before.run_dir / FIRST
        args = replace(args, init=str(first) if first.exists() else None)
    answer(before, different, args.resume_changed)
    if args.resume_changed:
        return args, before
    stop = Stop.of(args)
    if done < args.rounds and stop.before(before.content.get("stopped")) is None:
        log.info("going on with %s after round %d of %d", before.run_dir, done, args.rounds)
    facts = {"graphs": False} | before.content["run"]["facts"]  # older checkpoints do not tell
    for name in ARRANGEMENT:
        if getattr(args, name) not in ("auto", None, facts[name]):
            log.warning("%s: the run has %s and keeps it", flag(name), facts[name])
    return replace(args, **{name: facts[name] for name in ARRANGEMENT}), before


def check_observed(before: Before, args: RunArgs) -> None:
    """Refuse, or note, what `resume` left open, where the algorithm looks at metrics.

    When it sees them, and the last round is always evaluated, decides what comes next.
    """
    there = before.content["config"]
    here = asdict(args) | {"init": there.get("init")}  # was compared
    known = changes(there, here)
    different = [one for one in changes(there, here, looks=True) if one not in known]
    if different:
        answer(before, different, args.resume_changed)


def answer(before: Before, different: list[str], allowed: bool) -> None:
    """Refuse settings that differ, or write them to `changes.log`."""
    said = "; ".join(different)
    if allowed:
        log.warning("going on with other settings: %s", said or "none")
        with (before.run_dir / "changes.log").open("a", encoding="utf-8") as file:
            file.write(f"after round {before.content['run']['round']}: {said or 'none'}\n")
    elif different:
        raise InputError(
            f"--resume: {before.run_dir} was begun with other settings: {said}; "
            "give the same, or --resume-changed True for another result"
        )


def settings(args: RunArgs, arrangement: Arrangement) -> dict[str, Any]:
    """What config.yaml and the checkpoints of a run hold: what "auto" came to, too."""
    of_the_run = {k: value for k, value in asdict(args).items() if k not in OF_THIS_START}
    return of_the_run | asdict(arrangement)


def go_on(before: Before, config: Mapping[str, Any]) -> None:
    """Make the directory what it was after the checkpoint; a kill on the way does no harm.

    The results of a finished run, and checkpoints, rows of `metrics.jsonl` and of clients of later
    rounds go.
    """
    run_dir, done = before.run_dir, before.content["run"]["round"]
    rows, kept = run_dir / "metrics.jsonl", rows_of(run_dir / "metrics.jsonl", done)
    last = max(rounds_in(run_dir / CHECKPOINTS))
    if last > done:
        log.warning("rounds %d to %d, which are done, are trained again", done + 1, last)
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)
    rewind(run_dir / CHECKPOINTS, done)  # before the rows, for a checkpoint needs those before it
    forget_clients(run_dir, done)
    if rows.read_bytes() != kept:
        with atomic_file(rows) as file:
            file.write(kept)
    with atomic_file(run_dir / "config.yaml") as file:
        file.write(as_yaml(config))


def rows_of(path: Path, done: int) -> bytes:
    """The lines of the first `done` rounds, without later ones and a last one that was cut off.

    That of round 0, the evaluation of the first model, is among them unless `done` is 0: then it
    comes again. Raises InputError for a line that is no row, and where rows are missing.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected {done} rows") from error
    if not done:
        return b""
    first = 0 if re.match(rb'\{"round": 0\b', lines[0] if lines else b"") else 1
    kept = lines[: done + 1 - first]
    for number, line in enumerate(kept, start=1):
        try:
            row = json.loads(line)["round"] if line.endswith(b"\n") else None
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}, line {number}: not the row of a round") from error
        if row != number - 1 + first:
            what = f"not the row of round {number - 1 + first}"
            raise InputError(f"{path}, line {number}: {what}")
    if len(kept) + first <= done:
        there = len(kept) + first - 1
        raise InputError(f"{path}: {there} rows of {done} rounds; put the missing ones back")
    return b"".join(kept)


def _find(args: RunArgs) -> Before | None:
    out = None if args.out is None else Path(os.path.expanduser(args.out))
    if args.resume == "none":
        return None
    if args.resume == "auto":
        assert out is not None  # check_run says so
        if out.is_dir():
            hold(out)
        if rounds_in(out / CHECKPOINTS):
            return Before(out, newest_good(out / CHECKPOINTS)[1])
        _forget_start(out)
        return None
    path = Path(args.resume).expanduser()
    if path.is_file():
        if path.absolute().parent.name != CHECKPOINTS:
            raise InputError(f"--resume: {path} is not in the folder {CHECKPOINTS} of a run")
        run_dir = path.absolute().parents[1]
        hold(run_dir)
        content = load(path)
    else:
        run_dir = path
        if not rounds_in(path / CHECKPOINTS):
            what = "holds no checkpoint of a run" if path.is_dir() else "does not exist"
            raise InputError(
                f"--resume: {args.resume or '(empty)'} {what}; expected the directory of a run"
            )
        hold(run_dir)
        content = newest_good(path / CHECKPOINTS)[1]
    if out is not None and out.resolve() != run_dir.resolve():
        raise InputError(f"--out: a run goes on where it is, in {run_dir}; got {out}")
    return Before(run_dir, content)


def _forget_start(run_dir: Path) -> None:
    """Remove what a run left that ended before its first checkpoint; one with rounds is refused."""
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        if metrics.stat().st_size:
            raise InputError(
                f"--resume auto: {run_dir} has rounds and no checkpoint; choose another --out"
            )
        (run_dir / "config.yaml").unlink(missing_ok=True)
        (run_dir / FIRST).unlink(missing_ok=True)
        metrics.unlink()
        for folder in (run_dir / CHECKPOINTS, *run_dir.glob(f"{TABLE}*")):
            shutil.rmtree(folder, ignore_errors=True)
    for name in ("config.yaml", FIRST):
        for left in run_dir.glob(f".{name}.*"):
            left.unlink()
