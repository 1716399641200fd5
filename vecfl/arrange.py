"""Which arrangement a simulation takes: as given, by a rule, or the fastest of those measured.

No rule knows the fastest: vmap wins for many small clients and loses for convolutions on a CPU, and
cores serve operators better here, clients there. So "auto" is measured on the real task, once: the
choice is kept for this machine, model and shape, and the same command repeats the same bits.
"""

import logging
import time
from dataclasses import asdict, replace

from vecfl.arrangement import BACKENDS, FORMULATIONS, Arrangement, Wanted, check
from vecfl.choices import choices_file, keep, recall
from vecfl.engine import has_convolutions, require_cuda, usual_formulation
from vecfl.errors import InputError, is_integer
from vecfl.precision import check_precision
from vecfl.probe import Probe
from vecfl.trial import first_line
from vecfl_kernels import by_triton

log = logging.getLogger("vecfl")

AGREE = 1e-9  # what float64 arithmetic in another order may change


def arrange(wanted: Wanted, probe: Probe) -> Arrangement:
    """The arrangement that is wanted; what is measured is said in one line.

    Raises InputError where a backend that was named cannot train the task, or disagrees in float64
    with the loop.
    """
    try:
        by_triton(probe.device)
    except ValueError as error:
        raise InputError(str(error)) from None
    check_precision(wanted.precision, probe.device, probe.dtype)
    if wanted.graphs:
        require_cuda(probe.device)
    first, *_ = layouts(wanted, probe.cores, probe.forks)
    workers, threads, processes = first
    alone = Arrangement("loop", workers, threads, 1, processes)
    check(alone, probe.device, probe.algorithm, probe.task.layout)
    if not wanted.measured:
        return candidate(wanted, probe, wanted.backend, *first)
    facts = probe.facts() | {"wanted": asdict(wanted)}
    if kept := chosen_before(facts, probe):
        log.info("%s, as measured before (delete %s to measure again)", kept, choices_file())
        return kept
    began = time.perf_counter()
    chosen = search(wanted, probe)
    log.info(
        "%s: the fastest of %d, %.3g ms a round%s; measured in %.1f s, %s",
        chosen,
        len(probe.seconds),
        probe.seconds[chosen] * 1e3,
        "".join(f", {b} {s * 1e3:.3g}" for b, s in beaten(probe, chosen).items()),
        time.perf_counter() - began,
        keep(facts, asdict(chosen)),
    )
    return chosen


def chosen_before(facts: dict[str, object], probe: Probe) -> Arrangement | None:
    """The arrangement that was chosen before on this machine, if it still computes what it should.

    The facts do not hold what a module or a loss does, so it is compared with the loop again.
    """
    kept = recall(facts)
    if kept is None:
        return None
    try:
        numbers = [kept[name] for name in ("workers", "threads", "slots", "processes")]
        if kept["backend"] not in (*BACKENDS, *FORMULATIONS) or not all(
            is_integer(n) and n >= 1 for n in numbers
        ):
            raise ValueError("no arrangement")
        arrangement = Arrangement(**kept)
    except (TypeError, KeyError, ValueError):
        log.warning("%s holds no arrangement: %r; measuring anew", choices_file(), kept)
        return None
    try:
        if probe.disagreement(arrangement) <= AGREE:
            return arrangement
        log.warning("%s was chosen before, but disagrees with the loop now", arrangement)
    except Exception as error:
        log.warning("%s was chosen before: %s", arrangement, first_line(error))
    return None


def beaten(probe: Probe, chosen: Arrangement) -> dict[str, float]:
    """The best time of every other backend that was tried."""
    times: dict[str, float] = {}
    for a, seconds in probe.seconds.items():
        if a.backend != chosen.backend:
            times[a.backend] = min(seconds, times.get(a.backend, seconds))
    return times


def search(wanted: Wanted, probe: Probe) -> Arrangement:
    """The fastest arrangement, found one question after the other: backend, cores, slots."""
    first, *others = layouts(wanted, probe.cores, probe.forks)
    reason = ""
    for backend in BACKENDS if wanted.backend == "auto" else (wanted.backend,):
        try:
            if wanted.backend == "auto":
                probe.require_rules(backend)
            probe.time(candidate(wanted, probe, backend, *first))
        except InputError as error:
            if wanted.backend != "auto":
                raise
            log.info("backend %s is out: %s", backend, error)
            reason = str(error)
    if not probe.seconds:
        raise InputError(reason)
    if wanted.backend == "auto":
        formulate(probe)
    limit = probe.cores * min(probe.seconds.values())  # the cores cannot gain more
    close = [a for a, seconds in probe.seconds.items() if seconds <= limit]
    for layout in others:
        for a in close:
            probe.time(candidate(wanted, probe, a.backend, *layout))
    if wanted.slots == "auto":
        for factor in (4, 0.25, 2, 0.5):
            climb(probe, factor)
    return agreeing(probe)


def formulate(probe: Probe) -> None:
    """Try the other formulations of convolutions, where they matter, and keep the fastest alone."""
    tried = [a for a in probe.seconds if a.backend == "stacked"]
    usual = f"stacked-{usual_formulation(probe.device)}"
    if not tried or not has_convolutions(probe.task.module):
        return
    for other in FORMULATIONS:
        if other != usual:
            probe.time(replace(tried[0], backend=other))
    stacked = [a for a in probe.seconds if a.backend.startswith("stacked")]
    best = min(stacked, key=probe.seconds.__getitem__)
    for a in stacked:
        if a != best:
            probe.drop(a.backend)


def layouts(wanted: Wanted, cores: int, forks: bool) -> list[tuple[int, int, int]]:
    """(workers, threads, processes) to try: one core, then the cores for clients, for operators.

    Workers are processes where they can be, unless they shall be none.
    """
    apart = wanted.processes is None and forks
    if wanted.count != "auto":
        workers, processes = int(wanted.count), wanted.processes or 1
        threads = wanted.threads or (max(1, cores // workers) if processes == 1 else 1)
        return [(workers, threads, processes)]
    if wanted.threads:
        workers = max(1, cores // wanted.threads)
        tried = [(1, wanted.threads, 1), (workers, wanted.threads, 1)]
    else:
        tried = [(1, 1, 1), (cores, 1, cores if apart else 1), (1, cores, 1)]
    return list(dict.fromkeys(tried))


def candidate(
    wanted: Wanted, probe: Probe, backend: str, workers: int, threads: int, processes: int
) -> Arrangement:
    """An arrangement with the slots that are wanted, or those of the rule."""
    slots = probe.slots(backend, workers) if wanted.slots in (None, "auto") else int(wanted.slots)
    return Arrangement(backend, workers, threads, slots, processes, wanted.precision, wanted.graphs)


def climb(probe: Probe, factor: float) -> None:
    """Go on from the fastest arrangement to more slots, or fewer, while that is faster."""
    while True:
        best = probe.fastest()
        most = -(-len(probe.cohort) // best.workers)
        slots = max(1, min(round(best.slots * factor), most))
        probe.time(replace(best, slots=slots))
        if probe.fastest() == best:
            return


def agreeing(probe: Probe) -> Arrangement:
    """The fastest arrangement, or the next, that computes in float64 what the loop computes."""
    while True:
        best = probe.fastest()
        try:
            difference = probe.disagreement(best)
        except Exception as error:
            if len(probe.seconds) == 1:
                raise
            log.info("%s is out: %s", best, first_line(error))
            del probe.seconds[best]
            continue
        if difference <= AGREE:
            return best
        what = f"{best} is {difference:.1g} from the loop on one worker in float64"
        probe.drop(best.backend)
        if not probe.seconds:
            raise InputError(f"{what}; is the module's result random?")
        log.warning("%s; backend %s is out", what, best.backend)
