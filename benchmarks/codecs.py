"""What does a codec cost beside the fold of a message into the sum?

    python benchmarks/codecs.py

Each codec encodes and restores rows of --numbers numbers in float32, by the tensors of a CNN, and
the plain fold adds the same rows up. They take turns in one process. A row holds percentiles of the
time of a row of the message, the ratio of the medians to the fold, and its bytes. Rows are added to
benchmarks/results/codecs.jsonl, or to --out.

Takes less than a minute on two cores.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, provenance, quantiles_ms, write
from vecfl.aggregate import add_, empty
from vecfl.layout import Entry, Layout
from vecfl.transforms.codec import Senders, encode

CODECS = {
    "flute": vecfl.flute_quantizer(8),
    "flute, 0.9": vecfl.flute_quantizer(8, threshold=0.9),
    "stochastic": vecfl.stochastic_quantizer(8),
    "qsgd": vecfl.qsgd(127),
    "top_k": vecfl.top_k(0.01),
    "random_k": vecfl.random_k(0.01),
    "sign": vecfl.scaled_sign(),
}
SHARES = (0.001, 0.02, 0.0005, 0.97)  # of a tensor each, and the rest


def layout(numbers: int) -> Layout:
    """Tensors as a CNN has them: one holds nearly all numbers."""
    sizes = [max(1, int(numbers * share)) for share in SHARES]
    sizes.append(numbers - sum(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    entries = zip(sizes, starts, strict=True)
    return Layout(tuple(Entry(f"{at}", (n,), at, torch.float32) for n, at in entries))


def encoding(transform: vecfl.Transform, rows: Tensor, at: Senders) -> Callable[[], Tensor]:
    """Encodes the rows, and gives the bytes of each."""
    assert transform.codec is not None
    codec = transform.codec(0)
    return lambda: encode(codec, rows, at)[1]


def times_of(work: dict[str, Callable[[], Tensor]], passes: int) -> dict[str, list[float]]:
    """Seconds of each, which take turns."""
    took: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(passes):
        for name, one in work.items():
            began = time.perf_counter()
            one()
            took[name].append(time.perf_counter() - began)
    return took


def folding(rows: Tensor) -> Callable[[], Tensor]:
    """Adds the rows up, and gives the bytes of each."""
    sums, weight = empty(rows.shape[1], rows.device), torch.ones(len(rows)).double()
    size = torch.full((len(rows),), 4 * rows.shape[1])

    def fold() -> Tensor:
        add_(sums, rows, weight)
        return size

    return fold


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--numbers", type=positive, nargs="+", default=[7_850, 1_206_590], help="numbers in a row"
    )
    parser.add_argument("--passes", type=positive, default=30, help="timed turns of each codec")
    parser.add_out("codecs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for numbers in args.numbers:
        clients = max(1, (1 << 20) // numbers)  # that are folded at a time
        rows = torch.randn(clients, numbers, generator=torch.Generator().manual_seed(0)) / 100
        who = torch.arange(clients)
        at = Senders(0, 0, who, torch.zeros_like(who), layout(numbers))
        work = {"fold": folding(rows)}
        work |= {name: encoding(transform, rows, at) for name, transform in CODECS.items()}
        took, fold = times_of(work, args.passes), 0.0
        for name, times in took.items():
            found = quantiles_ms([seconds / clients for seconds in times])
            fold = fold or found["p50_ms"]
            row: Row = {"codec": name, "numbers": numbers, "clients": clients}
            row |= {"bytes": int(work[name]()[0]), **found}
            row |= {"folds": round(found["p50_ms"] / fold, 1)}
            write(args.out, row | provenance())
            print(f"{numbers} {name}: {found['p50_ms']} ms, {row['folds']} folds", flush=True)


if __name__ == "__main__":
    command(main)
