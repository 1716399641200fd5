"""Progress on stderr: a bar on a terminal, about ten plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

LEARNED = {"train/loss": "train loss {:#.3g}", "eval/accuracy": "test acc {:.1%}"}
PRIVACY = {"privacy/epsilon": "epsilon {:.3g}", "privacy/stands_for_clients": "as of {:,} clients"}
SPEED = {"system/clients_per_s": "{:,.0f} clients/s"}


def with_clients(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a round, without the loss where nobody took part: it is NaN, of nothing."""
    nobody = not metrics.get("train/clients", 1) and not metrics.get("train/dropped_clients")
    return {k: v for k, v in metrics.items() if k != "train/loss" or v == v or not nobody}


class Console:
    """Shows round, train loss, test accuracy, epsilon, clients per second and the time left.

    The accuracy of an evaluation with another name than eval is shown under that name.

    Metrics that a round does not bring (an evaluation every tenth round) keep their last value,
    with its round.
    """

    def __init__(self, rounds: int) -> None:
        self._latest: dict[str, tuple[float | int | str, float | int | str]] = {}
        self._progress: _Bar | _Lines = (_Bar if sys.stderr.isatty() else _Lines)(rounds)

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        rnd = metrics["round"]
        self._latest |= {key: (value, rnd) for key, value in with_clients(metrics).items()}
        named = {
            key: f"{key.removesuffix('/accuracy')} acc {{:.1%}}"
            for key in self._latest
            if key.endswith("/accuracy") and key not in LEARNED
        }
        shown = []
        for key, text in (LEARNED | named | PRIVACY | SPEED).items():
            if key in self._latest:
                value, when = self._latest[key]
                shown.append(text.format(value) + ("" if when == rnd else f" (round {when})"))
        with suppress(OSError):  # the terminal may go before the run does
            self._progress.show(int(rnd), ", ".join(shown))

    def close(self) -> None:
        with suppress(OSError):
            self._progress.close()


class _Bar:
    """A tqdm bar; log messages are written above it while it is open."""

    def __init__(self, rounds: int) -> None:
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self.bar = tqdm(
            total=rounds,
            bar_format="round {n_fmt}/{total_fmt} {bar} {desc}{remaining} left",
            miniters=1,
            dynamic_ncols=True,
        )
        self.redirected = ExitStack()
        self.redirected.enter_context(logging_redirect_tqdm())

    def show(self, rnd: int, text: str) -> None:
        self.bar.set_description_str(f"{text}, ", refresh=False)
        self.bar.update(rnd - self.bar.n)

    def close(self) -> None:
        self.bar.close()
        self.redirected.close()


class _Lines:
    """A line at every tenth of the rounds and at the last one."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.every = -(-rounds // 10)
        self.start = time.perf_counter()
        self.seen = 0

    def show(self, rnd: int, text: str) -> None:
        self.seen += rnd > 0
        if rnd % self.every and rnd != self.rounds:
            return
        if not rnd:  # the first model: what a round takes is not known yet
            print(f"round 0/{self.rounds}  {text}", file=sys.stderr, flush=True)
            return
        per_round = (time.perf_counter() - self.start) / self.seen
        minutes, seconds = divmod(round(per_round * (self.rounds - rnd)), 60)
        line = f"round {rnd}/{self.rounds}  {text}, {minutes:02d}:{seconds:02d} left"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass
