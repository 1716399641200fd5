"""Weights & Biases: the settings and metrics of a run on a dashboard, now or by `wandb sync`."""

import logging
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from vecfl.errors import InputError

log = logging.getLogger("vecfl")

# Where neither the environment nor W&B's settings files say otherwise. Nothing that W&B waits for
# may hold a run for long: what is not uploaded stays on disk.
SETTINGS = {
    "silent": True,
    "console": "off",
    "init_timeout": 10,  # seconds
    "finish_timeout": 30,  # seconds
    "finish_timeout_raises": True,
}
GROUPS = ("train", "eval", "client", "system")  # and evaluations with names of their own


class Wandb:
    """One record a round in W&B: online if logged in and in reach, else in a folder of `run_dir`.

    It asks nothing, and of W&B it raises nothing: what goes wrong is one line, and the run goes on
    without. As a context manager it tells W&B whether the run finished. `track` is "auto",
    "wandb", which raises InputError where wandb is not installed, or "none", which does nothing.
    A run that is gone on with has the `id` of before (see `new_id`); W&B drops rows that it has.
    The variables of W&B (WANDB_MODE, WANDB_PROJECT, WANDB_DIR, ...) overrule what is set here.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, object],
        *,
        group: str,
        track: Literal["auto", "wandb", "none"] = "auto",
        id: str | None = None,
    ) -> None:
        self._run: Any = None
        self._groups = set(GROUPS)
        check_wandb(track)
        if track == "none" or os.environ.get("WANDB_MODE") == "disabled":
            return
        if not _installed():
            _say("not installed, no dashboard: pip install wandb (or run with --track none)")
            return
        try:
            self._run = _start(run_dir, config, group, id)
        except Exception as error:
            _say(f"no dashboard: {_first_line(error)}")

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        def send(run: Any) -> None:
            groups = {key.partition("/")[0] for key in metrics if "/" in key}
            _draw_over_rounds(run, sorted(groups - self._groups))
            self._groups |= groups
            # W&B keeps back a step that is not committed until the next one begins.
            run.log(dict(metrics), step=metrics["round"], commit=True)

        self._guarded(send)

    def log_image(self, name: str, path: Path) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))})

        self._guarded(send)

    def close(self, exit_code: int = 0) -> None:
        """End the run and wait for its upload; any `exit_code` but 0 marks it as not finished."""
        run, self._run = self._run, None
        if run is not None:
            try:
                run.finish(exit_code=exit_code)
            except (Exception, KeyboardInterrupt) as error:
                log.warning("W&B: not all uploaded (%s); %s", _first_line(error), _sync(run))
                _abandon()

    def __enter__(self) -> "Wandb":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        interrupted = isinstance(error, KeyboardInterrupt)
        self.close(0 if error is None else 255 if interrupted else 1)  # W&B's own codes

    def _guarded(self, act: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            run, self._run = self._run, None
            log.warning("W&B: stopped (%s), the run goes on; %s", _first_line(error), _sync(run))
            _abandon()


def new_id() -> str:
    """An id for a run of W&B: WANDB_RUN_ID, or one of its own."""
    return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)


def check_wandb(track: str) -> None:
    """Raise `InputError` where `track` asks for W&B and it is missing: before a run."""
    if track == "wandb" and not _installed():
        raise InputError("--track wandb needs wandb: pip install wandb")


def _start(run_dir: Path, config: Mapping[str, object], group: str, id: str | None) -> Any:
    """The run that W&B has begun, online or offline, told in a line; None where it is disabled."""
    import wandb

    unset = {k: v for k, v in SETTINGS.items() if f"WANDB_{k.upper()}" not in os.environ}
    settings = wandb.Settings(**unset)
    wandb.termsetup(settings, None)  # or it would tell that it reads its settings files
    known = wandb.setup(settings).settings
    if known.mode == "disabled":
        return None
    options = {
        "project": known.project or "vecfl",
        "name": known.run_name or run_dir.resolve().name,
        "group": known.run_group or group,
        "dir": os.environ.get("WANDB_DIR") or run_dir,
        "config": dict(config),
        "id": id,
        "resume": "allow" if id else None,
        "reinit": "create_new",  # a run of the caller's own stays apart
    }
    run = _open(known.mode, options)
    run.define_metric("round")
    _draw_over_rounds(run, GROUPS)
    return run


def _draw_over_rounds(run: Any, groups: Iterable[str]) -> None:
    for group in groups:
        run.define_metric(f"{group}/*", step_metric="round")


def _open(mode: str, options: dict[str, Any]) -> Any:
    import wandb

    try:
        if mode in ("offline", "dryrun"):
            reason = f"mode {mode}"
        elif wandb.login(prompt=False, verify=False):
            run = wandb.init(**options)
            _say(run.url)
            return run
        else:
            reason = "not logged in"
    except wandb.Error as error:
        reason = _first_line(error)
    run = wandb.init(**options, mode="offline")
    _say(f"offline ({reason}); {_sync(run)}")
    return run


def _abandon() -> None:
    """Let go of W&B's process, whose end would print a traceback at exit if it is gone."""
    import wandb

    try:
        wandb.teardown()
    except (Exception, SystemExit):
        log.debug("W&B: teardown failed", exc_info=True)


def _installed() -> bool:
    spec = find_spec("wandb")  # a folder ./wandb of runs is a namespace, without an origin
    return spec is not None and spec.origin is not None


def _sync(run: Any) -> str:
    folder = str(Path(run.dir).parent)
    return f"to upload: wandb sync {shlex.quote(min(folder, os.path.relpath(folder), key=len))}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _say(text: str) -> None:
    print(f"W&B: {text}", file=sys.stderr, flush=True)
