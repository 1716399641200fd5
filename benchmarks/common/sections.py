"""The page of benchmarks, and its sections on vecfl alone."""

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import plots
from benchmarks.common.found import (
    NONE,
    Found,
    Ratio,
    machines,
    newest,
    number,
    read,
    table,
    time_of,
)


@dataclass
class Page:
    """What is written to `out` of the rows in `results`.

    verdicts  on each comparison; None where it was not measured
    """

    results: Path
    out: Path
    text: list[str] = field(default_factory=list)
    verdicts: dict[str, Ratio | None] = field(default_factory=dict)

    def add(self, *parts: str) -> None:
        self.text += ["", *parts]

    def judge(self, what: str, ratio: Ratio | None) -> None:
        self.verdicts[what] = ratio

    def picture(self, name: str, alt: str) -> Path:
        """Where a plot goes; the text shows it."""
        folder = self.out.with_suffix("")
        self.add(f"![{alt}]({folder.name}/{name}.png)\n")
        return folder / f"{name}.png"

    def short(self) -> str:
        """Where vecfl is faster and where it is not."""
        known = {what: ratio for what, ratio in self.verdicts.items() if ratio is not None}
        won = [f"- {what}: {ratio}" for what, ratio in known.items() if ratio.verdict == "faster"]
        lost = [
            f"- {what}: {ratio}, {ratio.verdict}"
            for what, ratio in known.items()
            if ratio.verdict != "faster"
        ]
        missing = [what for what, ratio in self.verdicts.items() if ratio is None]
        parts = ["## In short", "How many times faster vecfl (`auto`) is.", "### Not faster"]
        parts += ["\n".join(lost) or "Nothing that was measured."]
        parts += ["### Faster", "\n".join(won) or "Nothing that was measured."]
        if missing:
            parts += [f"### {NONE.capitalize()}", "; ".join(missing) + "."]
        return "\n\n".join(parts)


def scaling(page: Page) -> None:
    """One axis at a time; and ranks."""
    by = newest(read(page.results, "scaling"), "axis", "value")
    page.add("## Scaling\n\n`python benchmarks/scaling.py`: one axis at a time")
    drawn: dict[str, plots.Series] = {}
    for (axis, _), row in by.items():
        if axis in plots.AXES:
            drawn.setdefault(axis, {axis: []})[axis].append((row[axis], row))
    if drawn:
        plots.scaling(page.picture("scaling", "Clients a second over each axis"), drawn)
    keys = ("parameters", "cohort", "population", "slots", "workers", "processes")
    lines = [
        [axis, value, *(number(row[key]) for key in keys), time_of(row), *rates(row)]
        for (axis, value), row in by.items()
    ]
    head = ["axis", "value", *keys, "ms a round", "clients/s", "client steps/s"]
    page.add(table(head, lines, by.values()))
    ranks = newest(read(page.results, "ranks"), "workload", "ranks")
    lines = [
        [work, number(row["parameters"]), row["cohort"], n, time_of(row["round"])]
        for (work, n), row in ranks.items()
    ]
    page.add("### Ranks\n\n`python benchmarks/ranks.py`\n")
    page.add(table(["workload", "parameters", "cohort", "ranks", "ms"], lines, ranks.values()))


def rates(row: Found) -> list[str]:
    return [number(row.get("clients_per_s")), number(row.get("client_steps_per_s"))]


def scale(page: Page) -> None:
    """Cohorts of a large population."""
    by = newest(read(page.results, "scale"), "workload", "population", "cohort")
    populations = sorted({row["population"] for row in by.values()})
    of = " or ".join(map(number, populations))
    page.add("## Large cohorts from a store on disk\n\n`python benchmarks/scale.py`")
    series: plots.Series = {}
    for (work, population, cohort), row in by.items():
        label = work if len(populations) == 1 else f"{work}, of {population:,}"
        series.setdefault(label, []).append((cohort, row))
    if series:
        page.add(f"The store holds {of} clients.")
        path = page.picture("scale", "Clients a second and memory over the cohort")
        title = f"Cohorts drawn from {of} clients in a store on disk; {machines(by.values())}"
        plots.scale(path, title, series)
    lines = [
        [work, number(cohort), number(row["population"]), time_of(row), row["ms_per_client"]]
        + [f"x{row['of_smallest']}", *rates(row), number(row["anon_peak_mib"])]
        + [f"{row['grown_bytes_per_client']:,} of {4 * row['parameters']:,}"]
        + [number(row["wait_ms"]), ", ".join(f"{key} {value}" for key, value in row["ran"].items())]
        for (work, _, cohort), row in by.items()
    ]
    head = ["workload", "cohort", "population", "ms a round", "ms a client"]
    head += ["of that with the smallest cohort", "clients/s", "client steps/s", "MiB at most"]
    head += [
        "bytes of memory that a further client takes, of those of a model",
        "draw and wait, ms",
        "ran on",
    ]
    page.add(table(head, lines, by.values()))


BANDWIDTH = """Each operation goes over rows of numbers, one for each client. *levels* rounds them
at random to one of 256 levels between the least and the greatest of a row, *multiples* to multiples
of its length / 127. More than 1 of a copy is possible: bytes that an operation finds in a cache
count as if they came from memory."""


def bandwidth(page: Page) -> None:
    """What follows training against a copy."""
    by = newest(read(page.results, "bandwidth"), "device", "kernels", "numbers", "operation")
    page.add("## After training: bytes a second against a copy\n\n`python benchmarks/bandwidth.py`")
    page.add(BANDWIDTH)
    names = list(dict.fromkeys(operation for *_, operation in by))
    values: dict[str, list[float | None]] = {}
    for device, kernels, numbers, _ in by:
        rows = [by.get((device, kernels, numbers, name)) for name in names]
        label = f"{device}, {kernels}, rows of {numbers:,} numbers"
        values[label] = [row["of_a_copy"] if row else None for row in rows]
    if by:
        path = page.picture("bandwidth", "Bytes a second of each operation against a copy")
        title = f"How close is what follows training to a plain copy?\n{machines(by.values())}"
        unit = "bytes a second, as a part of those of a copy of the rows (1: as fast)"
        plots.bars(path, title, unit, names, values)
    lines = [
        [device, kernels, number(numbers), name, time_of(row), row["gb_s"], row["of_a_copy"]]
        for (device, kernels, numbers, name), row in by.items()
    ]
    head = ["device", "kernels", "numbers in a row", "operation", "ms", "GB/s", "of a copy"]
    page.add(table(head, lines, by.values()))


PRIVACY = """One thread, with the slots of the plain rounds in the same backend. Of clients:
`vecfl.private` around FedAvg with uniform weights, with a norm that clips every message and with
an adaptive one. Of examples: `vecfl.dp_sgd`, which the stacked backend does not do. Ratios are
medians over turns in one process, with their 20th and 80th percentile. An epsilon is computed when
it is told, not in a round, and is not in them."""


def privacy(page: Page) -> None:
    """What privacy adds to a round."""
    keys = ("workload", "cohort", "unit", "mechanism", "backend")
    by = newest(read(page.results, "private_rounds"), *keys)
    page.add("## Rounds under privacy\n\n`python benchmarks/private_rounds.py`\n")
    page.add(PRIVACY)
    page.add()
    lines = [
        [*key, row["slots"], time_of(row)]
        + [slower(row, "of_plain"), slower(row, "of_fastest"), row["fastest"]]
        for key, row in by.items()
    ]
    head = ["workload", "cohort", "protected", "mechanism", "backend", "slots", "ms"]
    head += ["of a plain round", "of the fastest plain round", "which is in"]
    page.add(table(head, lines, by.values()))


def slower(row: Found, ratio: str) -> str:
    """How many times as long a round takes, and between which percentiles of the turns."""
    return f"x{row[ratio]:.2f} ({row[f'{ratio}_p20']:.2f} to {row[f'{ratio}_p80']:.2f})"


def memory(page: Page) -> None:
    """How much a larger cohort takes."""
    by = newest(read(page.results, "memory"), "workload", "cohort", "malloc")
    lines = [[*key, row["slots"], row["peak_mib"], row["growth_mib"]] for key, row in by.items()]
    page.add("## Memory of a round\n\n`python benchmarks/memory.py`\n")
    head = ["workload", "cohort", "malloc", "slots", "peak MiB", "growth MiB"]
    page.add(table(head, lines, by.values()))


def limits(page: Page) -> None:
    """What a round on one core is made of."""
    by = newest(read(page.results, "limits"), "workload")
    parts = ("plain loop", "vecfl", "products", "once a client")
    linear = {work: row for (work,), row in by.items() if "client_step" in row}
    lines = [
        [work, row["slots"], *(number(row["client_step"][part]["p50_us"]) for part in parts)]
        + [f"x{row['speedup']}", f"x{row['by_products_alone']}"]
        for work, row in linear.items()
    ]
    page.add("## What limits one core\n\n`python benchmarks/limits.py`: one thread, one worker\n")
    head = ["workload", "slots", "plain loop, us a client step", "vecfl", "its matrix products"]
    head += ["seating and summing of rows", "reached", "by the products alone"]
    page.add(table(head, lines, linear.values()))
    others = {work: row for (work,), row in by.items() if "share" in row}
    if others:
        page.add("Of other models, how much of the plain loop's time is in torch's own kernels:\n")
        lines = [[work, row["share"], f"x{row['at_most']}"] for work, row in others.items()]
        head = ["workload", "share of products and convolutions", "without all else"]
        page.add(table(head, lines, others.values()))


def gpu(page: Page) -> None:
    """Rounds and steps on a GPU."""
    by = newest(
        (row for row in read(page.results, "gpu") if "measure" in row),
        *("workload", "measure", "cohort", "slots", "arrangement"),
    )
    lines = [
        [*map(number, key), time_of(row), number(row.get("speedup"))] for key, row in by.items()
    ]
    page.add("## On a GPU\n\n`bash benchmarks/gpu.sh`; with TF32, against the plain loop there\n")
    head = ["workload", "measured", "cohort", "slots", "arrangement", "ms", "times faster"]
    page.add(table(head, lines, by.values()))


ALL = (limits, scale, scaling, bandwidth, privacy, memory, gpu)
