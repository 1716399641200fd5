"""Runs an oracle `Setting` on vecfl, so that both can be compared."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import vecfl
from vecfl import FederatedDataset, Simulation, Task
from vecfl.algorithms import Algorithm, Finished, Upload
from vecfl.augment import Transform
from vecfl.optim import ClientOptimizer
from vecfl.server_optim import ServerOptimizer

from .augment import Transforms
from .loop import Columns, Loss, Setting
from .tasks import classes
from .toy import habit

OURS = {classes: vecfl.cross_entropy}  # vecfl's own losses, which some backends differentiate


@dataclass
class Run:
    """What vecfl made of a setting, one entry a round."""

    models: list[Columns] = field(default_factory=list)
    updates: list[dict[int, list[tuple[Tensor, float]]]] = field(default_factory=list)
    metrics: list[dict] = field(default_factory=list)
    rows: list[dict[str, Tensor]] = field(default_factory=list)  # of all clients, where they keep
    server: list[dict[str, Tensor]] = field(default_factory=list)  # its tensors


def dataset(clients: list[Columns]) -> FederatedDataset:
    """The clients' columns, one after the other; values are not looked at."""
    sizes = torch.tensor([0] + [len(c["x"]) for c in clients])
    names = next(c for c in clients if len(c["x"])).keys()
    columns = {name: torch.cat([c[name] for c in clients if len(c["x"])]) for name in names}
    return FederatedDataset(columns, sizes.cumsum(0), range(len(clients)))


def transforms(names: Transforms) -> list[Transform]:
    """What vecfl calls these transforms."""
    return [getattr(vecfl, name)(*arguments) for name, *arguments in names]


def optimizer(s: Setting) -> ClientOptimizer:
    found = {
        "sgd": vecfl.sgd(s.decay),
        "momentum": vecfl.momentum(s.momentum, weight_decay=s.decay),
        "nesterov": vecfl.momentum(s.momentum, nesterov=True, weight_decay=s.decay),
        "adam": vecfl.adam(s.betas, s.eps, s.decay),
        "adamw": vecfl.adamw(s.betas, s.eps, s.weight_decay),
        "rmsprop": vecfl.rmsprop(s.alpha, s.eps, weight_decay=s.decay),
        "centered": vecfl.rmsprop(s.alpha, s.eps, s.momentum, True, s.decay),
        "adagrad": vecfl.adagrad(s.eps, s.decay),
    }[s.optimizer]
    return found if s.factor is None else vecfl.within_round(found, s.factor)


def server(s: Setting) -> ServerOptimizer:
    """What vecfl calls the oracle's server."""
    if (of := s.server) is None:
        return vecfl.server_sgd(s.server_lr)
    betas, decay = of.betas, of.weight_decay
    made = {
        "sgd": lambda: vecfl.server_sgd(of.lr),
        "momentum": lambda: vecfl.server_momentum(of.lr, of.beta),
        "adam": lambda: vecfl.server_adam(of.lr, betas, of.eps),
        "adamw": lambda: vecfl.server_adamw(of.lr, betas, of.eps, decay),
        "adamax": lambda: vecfl.server_adamax(of.lr, betas, of.eps),
        "adagrad": lambda: vecfl.fedopt_adagrad(of.lr, betas[0], of.eps),
        "yogi": lambda: vecfl.fedopt_yogi(of.lr, betas, of.eps),
        "fedadam": lambda: vecfl.fedopt_adam(of.lr, betas, of.eps),
        "lars": lambda: vecfl.server_lars(of.lr, of.beta, decay, of.trust),
        "lamb": lambda: vecfl.server_lamb(of.lr, betas, of.eps, decay),
    }[of.optimizer]()
    if of.clip is not None:
        made = vecfl.clipped(made, of.clip)
    return vecfl.scheduled(made, of.schedule) if of.schedule else made


def around(inner: Algorithm, s: Setting, task: Task) -> Algorithm:
    """The algorithm with what stands around it."""
    if s.server_plateau is not None:
        inner = vecfl.server_on_plateau(inner, "train/loss", "min", *s.server_plateau)
    if s.client_plateau is not None:
        inner = vecfl.clients_on_plateau(inner, "train/loss", "min", *s.client_plateau)
    if (r := s.replay) is not None:
        how = {"lr": r.lr, "batches": batches(r), "optimizer": optimizer(r), "clip": r.clip}
        inner = vecfl.replay(inner, task, s.replay_data, **how)
    return inner if s.ema is None else vecfl.ema(inner, s.ema)


def batches(s: Setting, columns: Columns | None = None) -> vecfl.Batches:
    """The work of a round; tokens are counted in the data's column "y"."""
    epochs = vecfl.random_epochs(*s.random_epochs) if s.random_epochs else s.epochs
    counts = s.token_cap and columns and vecfl.count_tokens(columns["y"])
    return vecfl.Batches(
        s.batch,
        epochs=epochs if s.steps is None else None,
        steps=s.steps,
        last=s.last,
        full=s.full,
        max_examples=s.cap,
        max_tokens=s.token_cap,
        tokens=counts,
    )


def algorithm(s: Setting, columns: Columns | None = None) -> Algorithm:
    weights = {
        "examples": vecfl.by_examples,
        "uniform": vecfl.uniform_weights,
        "capped": vecfl.capped(s.weight_cap or 1),
        "tokens": vecfl.by_tokens,
    }[s.weight]
    if s.examples is not None:
        clip, z = s.examples
        inner = algorithm(replace(s, examples=None), columns)
        return vecfl.dp_sgd(inner, clip=clip, noise_multiplier=z, delta=1e-5)
    if s.algorithm == "fedsgd":
        kind = {"size": s.batch, "max_examples": s.cap, "weights": weights}
        return vecfl.fedsgd(server=server(s), **kind)
    common = {
        "lr": s.lr,
        "batches": batches(s, columns),
        "optimizer": optimizer(s),
        "clip": s.clip,
        "weights": weights,
        "server": server(s),
    }
    if s.algorithm == "habit":
        return habit(**common)
    if s.algorithm == "scaffold":
        del common["weights"], common["clip"]
        return vecfl.scaffold(option=s.option, **common)
    if s.algorithm == "feddyn":
        del common["weights"], common["server"]
        return vecfl.feddyn(alpha=s.dyn, **common)
    if s.algorithm == "fednova":
        return vecfl.fednova(mu=s.mu, **common)
    if s.weighting:
        del common["weights"]
        return vecfl.dga(weighting=s.weighting, softmax_beta=s.softmax_beta, **common)
    if s.adaptive is not None:
        step, patience = s.adaptive
        return vecfl.fedprox_adaptive(start=s.mu, step=step, patience=patience, **common)
    return vecfl.fedprox(mu=s.mu, **common) if s.mu else vecfl.fedavg(**common)


def clips(s: Setting) -> list[vecfl.Transform]:
    made = {"norm": vecfl.clip_by_norm, "layer": vecfl.clip_by_layer}
    return [made[per](limit) for per, limit in s.clips]


def aggregated(algorithm: Algorithm, s: Setting) -> Algorithm:
    """The algorithm with delays, or with an aggregator."""
    if s.delays or s.buffer > 1:
        delay = vecfl.drawn_delay(s.delays) if s.delays else None
        discount = None if s.discount is None else vecfl.polynomial(s.discount)
        return vecfl.delayed(algorithm, delay, buffer=s.buffer, discount=discount)
    if not s.aggregator:
        return algorithm
    found = {"median": vecfl.coordinate_median(), "trimmed": vecfl.trimmed_mean(0.2)}
    return vecfl.aggregated_by(algorithm, found[s.aggregator])


def private(algorithm: Algorithm, s: Setting) -> Algorithm:
    """The algorithm under the promise of the setting."""
    if (p := s.private) is None:
        return algorithm
    clip = vecfl.clip_by_layer(p.norm) if p.per == "layer" else vecfl.clip_by_norm(p.norm)
    if p.adaptive is not None:
        quantile, lr, count_noise = p.adaptive
        clip = vecfl.adaptive_clip(p.norm, quantile=quantile, lr=lr, count_noise=count_noise)
    return vecfl.private(
        algorithm, clip, noise_multiplier=p.multiplier, cohort=p.cohort, delta=1e-3
    )


def codec(s: Setting) -> list[vecfl.Transform]:
    """What vecfl calls the oracle's codec."""
    if not s.codec:
        return []
    made = {
        "top_k": vecfl.top_k,
        "random_k": vecfl.random_k,
        "sign": vecfl.scaled_sign,
        "qsgd": vecfl.qsgd,
        "stochastic": vecfl.stochastic_quantizer,
        "flute": vecfl.flute_quantizer,
    }[s.codec[0]](*s.codec[1:])
    return [vecfl.error_feedback(made) if s.feedback else made]


def recorded(algorithm: Algorithm, updates: list[dict]) -> Algorithm:
    """`algorithm`, with what every client sends written down in the last entry of `updates`.

    A client sends as often as it stands in the cohort.
    """

    def upload(state: dict, done: Finished) -> Upload:
        sent = algorithm.upload(state, done)
        weight = sent.weight if sent.log_weight is None else sent.weight * sent.log_weight.exp()
        rows = zip(done.client.tolist(), sent.update.clone(), weight.tolist(), strict=True)
        for k, row, weight in rows if updates else ():
            updates[-1].setdefault(k, []).append((row, weight))
        return sent

    return replace(algorithm, upload=upload).promises(algorithm.privacy)


def sampler(s: Setting) -> vecfl.sampling.Sampler:
    if s.cohort is None:
        return vecfl.everyone()
    if isinstance(s.cohort, int):
        return vecfl.uniform(s.cohort)
    cohorts = [torch.tensor(cohort, dtype=torch.int64) for cohort in s.cohort]
    drawn = lambda eligible, seed, round: cohorts[round]  # noqa: E731
    if s.private is None:
        return drawn
    mean = s.private.cohort  # as if a known law had drawn them
    return vecfl.sampling.lawful(drawn, lambda n: vecfl.privacy.Sampling("poisson", mean / n))


def run_vecfl(
    module: nn.Module,
    loss: Loss,
    clients: list[Columns],
    s: Setting,
    *,
    backend: str,
    slots: int | None,
    workers: int = 1,
    dtype: torch.dtype = torch.float64,
    table: Path | None = None,
) -> Run:
    """The rounds of `s`; asserts that these backend, slots and workers really ran."""
    data, result = dataset(clients), Run()
    if s.freeze:
        vecfl.freeze(module, s.freeze)
    loss, augment = OURS.get(loss, loss), transforms(s.augment)
    task = Task(module, loss, example=data.examples(2), augment=augment)
    sim = Simulation(
        task,
        data,
        aggregated(
            recorded(
                private(
                    vecfl.chain(around(algorithm(s, data.columns), s, task), *clips(s), *codec(s)),
                    s,
                ),
                result.updates,
            ),
            s,
        ),
        sampler(s),
        backend=backend,
        workers=workers,
        slots=slots,
        seed=s.seed,
        sample_seed=s.sample_seed,
        dtype=dtype,
        table=table,
        statistics=len(clients) * 4,
    )
    state = sim.start()
    for _ in range(s.rounds):
        result.updates.append({})
        state, metrics = sim.round(state)
        state = sim.observe(state, metrics)
        assert metrics["system/backend"] == backend
        assert metrics["system/workers"] == workers
        assert slots is None or metrics["system/slots"] == slots
        result.models.append(sim.state_dict(state))
        result.metrics.append(metrics)
        result.server.append(state.server)
        state = sim.observe(state, metrics)
        if state.table is not None:
            result.rows.append(state.table.gather(torch.arange(len(clients))))
    return result
