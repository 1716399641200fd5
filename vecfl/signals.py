"""SIGINT, SIGTERM, SIGHUP: the first stops a run after its round, the second stops it at once."""

import os
import signal
from contextlib import suppress
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

NUMBERS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def ignored(number: signal.Signals) -> bool:
    """Whether the process was told to ignore it, as nohup does with SIGHUP."""
    return signal.getsignal(number) == signal.SIG_IGN


class Stopped(KeyboardInterrupt):
    """A run that a signal has stopped; the text says how to go on, `code` is the exit code."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.code = 128 + number


class Signals:
    """Inside `with`, `came` is the last of these signals that came, 0 before.

    The first is told in a line and no more; the second raises KeyboardInterrupt wherever the main
    thread is. Other threads than the main one never get a signal, and change nothing here.
    """

    def __init__(self) -> None:
        self.came = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if current_thread() is main_thread():
            heard = [n for n in NUMBERS if not (n.name == "SIGHUP" and ignored(n))]
            self._before = {number: signal.signal(number, self._take) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        again, self.came = self.came, number
        if again:
            raise KeyboardInterrupt
        line = f"{signal.Signals(number).name}: finishing this round; again to stop at once\n"
        with suppress(OSError):
            os.write(2, line.encode())  # sys.stderr may be in the middle of a line of its own
