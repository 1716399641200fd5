"""How much faster than a plain loop could a round become?

    python benchmarks/limits.py

On one thread, in turns in one process: a round of the plain loop, one of vecfl (`stacked`, one
worker, slots by measurement), and of that round two parts that no arrangement on this core does
without: the matrix products of its steps alone, and what happens once a client, that the model is
written into a row and that w - row is added to the sum in float64. A row holds, for each, the time
of a client step with its percentiles, the ratio that was reached and the one that would be if there
were nothing but products. That is for models of linear layers. Of all others a row holds which
share of the loop's time its products and convolutions are, by the profiler: torch's own kernels,
which vecfl calls as well, so that on this core it can be 1 / share times faster at most. Rows are
added to benchmarks/results/limits.jsonl, or to --out.

Takes a minute or two on two cores.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, provenance, quantiles_ms, write
from benchmarks.common.workloads import MODELS, Workload, plain_round, simulation
from vecfl_kernels import weighted_sum_

LINEAR, WARM, LOOP = ["logistic", "mlp"], 2, "plain loop"
OTHERS = ["cnn", "cifar_cnn", "pfl_cnn", "lstm", "resnet"]
KERNELS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "convolution_backward")}
KERNELS |= {"aten::mkldnn_convolution", "aten::_slow_conv2d_forward", "aten::thnn_conv2d"}
KERNELS |= {"aten::mkldnn_rnn_layer", "aten::mkldnn_rnn_layer_backward"}


def products(work: Workload, slots: int) -> Callable[[], object]:
    """The products of a step of `slots` clients: forward, and the gradients of weight and input."""
    calls = []
    for place, m in enumerate(m for m in work.module().modules() if isinstance(m, nn.Linear)):
        x, w = torch.randn(slots, work.batch, m.in_features), torch.randn(slots, *m.weight.shape)
        out, below = torch.randn(slots, work.batch, m.out_features), torch.empty_like(x)
        calls += [(x, w.mT, torch.empty_like(out)), (out.mT, x, torch.empty_like(w))]
        calls += [(out, w, below)] if place else []

    def step() -> None:
        for a, b, into in calls:
            torch.bmm(a, b, out=into)

    return step


def once(work: Workload, slots: int) -> Callable[[], object]:
    """What happens to the rows of `slots` clients before and after their steps."""
    model = torch.cat([p.detach().flatten() for p in work.module().parameters()])
    rows, total = model.repeat(slots, 1), torch.zeros(len(model), dtype=torch.float64)
    weight = torch.ones(slots, dtype=torch.float64)

    def seat_and_fold() -> None:
        rows[:] = model
        weighted_sum_(total, model - rows, weight)

    return seat_and_fold


def measure(work: Workload, rounds: int) -> Row:
    """Microseconds of a client step, by part."""
    sim = simulation(work, backend="stacked", slots="auto", workers=1)
    state, slots = sim.start(), sim.arrangement.slots
    steps = work.steps // work.clients  # of a client, each time it is seated
    loop = plain_round(work, tuned=True)
    parts: dict[str, tuple[Callable[[], object], float]] = {  # and the client steps of a call
        LOOP: (loop, work.steps),
        "vecfl": (lambda: sim.round(state), work.steps),
        "products": (products(work, slots), slots),
        "once a client": (once(work, slots), slots * steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(WARM + rounds):
        for name, (call, count) in parts.items():
            calls = max(1, round(work.steps / count))
            began = time.perf_counter()
            for _ in range(calls):
                call()
            if turn >= WARM:
                seconds[name].append((time.perf_counter() - began) / (calls * count))
    times = {name: quantiles_ms([1e3 * s for s in each]) for name, each in seconds.items()}
    us = {name: {q.replace("_ms", "_us"): t for q, t in of.items()} for name, of in times.items()}
    middle = {name: of["p50_us"] for name, of in us.items()}
    return {
        **{"slots": slots, "rounds": rounds, "client_step": us},
        "speedup": round(middle[LOOP] / middle["vecfl"], 2),
        "by_products_alone": round(middle[LOOP] / middle["products"], 2),
    }


def in_kernels(work: Workload) -> Row:
    """The share of a round of the plain loop that its products and convolutions take."""
    play = plain_round(work, tuned=True)
    play()
    began = time.perf_counter()
    play()
    whole = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        play()
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    share = sum(us for name, us in times.items() if name in KERNELS) / 1e6 / whole
    return {"share": round(share, 3), "at_most": round(1 / share, 2)}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_some("--workloads", [*LINEAR, *OTHERS], "models that are trained")
    parser.add_argument(
        "--clients", type=positive, help="of a round; the workload's own if not given"
    )
    parser.add_argument("--rounds", type=positive, default=15, help="timed rounds of each")
    parser.add_out("limits")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.workloads:
        work = replace(MODELS[name], clients=args.clients or MODELS[name].clients)
        row = measure(work, args.rounds) if name in LINEAR else in_kernels(work)
        write(args.out, {"workload": name} | row | provenance())
        if name in LINEAR:
            print(f"{name}: x{row['speedup']}, by products alone x{row['by_products_alone']}")
        else:
            print(f"{name}: {row['share']} in torch's kernels, so x{row['at_most']} at most")


if __name__ == "__main__":
    command(main)
