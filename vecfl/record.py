"""A run with a directory of its own: what the recipes do between the first round and the last."""

from collections.abc import Callable, Mapping
from contextlib import closing

from vecfl.report import draw_curves, summary
from vecfl.simulation import Metrics, Simulation, State
from vecfl.track import Console, Jsonl, create_run_dir, save_model


def record_run(
    sim: Simulation,
    rounds: int,
    evaluate: Callable[[State], Metrics],
    *,
    out: str | None,
    recipe: str,
    config: Mapping[str, object],
    eval_every: int = 1,
) -> None:
    """`rounds` rounds into the run directory `out`, or a dated one: metrics, model, curves.

    `evaluate` is called every `eval_every` rounds and after the last; `config` are the settings
    for config.yaml. Progress goes to stderr, the summary to stdout. An interrupted run keeps its
    metrics and its model, and the KeyboardInterrupt says where. Raises InputError and OSError with
    the path for what cannot be written.
    """
    run_dir = create_run_dir(out, recipe, config)
    state = sim.start()
    try:
        with closing(Jsonl(run_dir / "metrics.jsonl")) as log, closing(Console(rounds)) as bar:
            while state.round < rounds:
                state, metrics = sim.round(state)
                if state.round % eval_every == 0 or state.round == rounds:
                    metrics |= evaluate(state)
                log.log(metrics)
                bar.log(metrics)
    except KeyboardInterrupt:
        save_model(run_dir / f"model-round-{state.round}.pt", sim.state_dict(state))
        so_far = f"interrupted after round {state.round} of {rounds}, not finished"
        raise KeyboardInterrupt(f"{so_far}; metrics and model so far: {run_dir}") from None
    save_model(run_dir / "model.pt", sim.state_dict(state))
    draw_curves(run_dir)
    print(summary(run_dir))
