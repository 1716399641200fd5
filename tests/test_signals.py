"""The first signal is kept, the second interrupts."""

import os
import signal
from collections.abc import Iterator
from threading import Thread

import pytest

from vecfl.signals import Signals, Stopped


@pytest.fixture
def hangups() -> Iterator[None]:
    """SIGHUP ends a process, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_is_told_and_the_second_interrupts(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with Signals() as signals:
        assert signals.came == 0
        os.kill(os.getpid(), number)
        assert signals.came == number
        said = capfd.readouterr().err
        assert said == f"{number.name}: finishing this round; again to stop at once\n"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.came == signal.SIGTERM
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_leaves_signals_alone() -> None:
    seen = []

    def run() -> None:
        with Signals() as signals:
            seen.append((signals.came, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


def test_exit_codes() -> None:
    codes = [Stopped("", number).code for number in (signal.SIGINT, signal.SIGTERM)]
    assert codes == [130, 143]


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.came == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
