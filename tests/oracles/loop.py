"""Federated learning as a plain loop over clients: what vecfl has to agree with.

Written from docs/design.md alone, with nn.Module, autograd and torch.optim, one client at a time.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from . import codecs, philox
from .augment import Transforms, augment
from .dropout import Place, replace_dropout
from .memory import Memory, coefficients, new_variate
from .private import Mechanism, Private
from .server import Plateau, Server, ServerSetting

MEMORY = ("scaffold", "feddyn")
Columns = dict[str, Tensor]
Loss = Callable[[Tensor, Columns], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """One federated experiment."""

    # fedavg (FedProx: mu > 0) | fedsgd | habit | scaffold | feddyn | fednova
    algorithm: str = "fedavg"
    rounds: int = 3
    # None: all clients, in their order; a number: drawn by sample_seed; or the cohorts themselves
    cohort: int | tuple[tuple[int, ...], ...] | None = None
    seed: int = 0
    sample_seed: int = 0
    # sgd | momentum | nesterov | adam | adamw | rmsprop | centered (RMSprop, momentum) | adagrad
    optimizer: str = "sgd"
    lr: float | Callable[[int], float] = 0.1  # a function is called with the round
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01  # adamw only
    decay: float = 0.0  # of the others: L2, in the gradient
    alpha: float = 0.99  # of RMSprop
    factor: Callable[[int], float] | None = None  # of lr, by a client's own steps of the round
    epochs: int | tuple[int, ...] | None = 1  # a tuple: by client
    random_epochs: tuple[int, int, float] | None = None  # low, high, share of those who draw
    steps: int | tuple[int, ...] | None = None  # where given, work is counted in steps, not epochs
    batch: int = 4
    last: str = "keep"  # keep | drop | wrap
    full: bool = False  # a step is an epoch, its gradient added up over batches
    cap: int | None = None  # most examples of a client in a round
    token_cap: int | None = None  # most labels "y" that are not -100, in all but one example
    clip: float | None = None
    mu: float = 0.0
    adaptive: tuple[float, int] | None = None  # step of mu by the loss, and falls before one down
    weight: str = "examples"  # examples | uniform | capped | tokens
    weight_cap: int | None = None
    server_lr: float = 1.0
    augment: Transforms = ()  # of "x", in training
    weighting: str = ""  # DGA: loss | flute_loss | uniform | [update_]variance, mean, rms
    softmax_beta: float = 1.0
    clips: tuple[tuple[str, float], ...] = ()  # of what clients send: ("norm" | "layer", C), ...
    delays: tuple[float, ...] = ()  # probabilities that a message is 0, 1, ... rounds late
    buffer: int = 1  # messages that the server waits for
    discount: float | None = None  # a message counts (1 + age)^-discount
    aggregator: str = ""  # median | trimmed (a fifth at either end); else the weighted mean
    codec: tuple = ()  # of what they send then: see `codecs.encode`
    feedback: bool = False  # with error feedback
    freeze: str = ""  # parameters with a name in which this is found do not train
    server: ServerSetting | None = None  # in place of server_lr
    ema: float | None = None  # decay: `models` are the means, over parameters
    replay: "Setting | None" = None  # how the server trains then on `replay_data`
    replay_data: Columns = field(default_factory=dict)
    # (factor, patience): the rate falls where the training loss of rounds gets no better
    server_plateau: tuple[float, int] | None = None
    client_plateau: tuple[float, int] | None = None
    examples: tuple[float, float] | None = None  # DP-SGD: clip C and noise multiplier z
    option: int = 2  # of SCAFFOLD
    dyn: float = 0.1  # alpha of FedDyn; its clients' mu is that
    private: Private | None = None


@dataclass
class Result:
    """What happened, one entry a round; an update is (client, update [P] in float64, weight).

    habits: of habit, the mean of each client's moves [P] and their number. mu: that of the round.
    own, server: what clients [N, trainable] and server [trainable] of SCAFFOLD and FedDyn remember.
    An update of SCAFFOLD is [2P]: the change of the variate stands behind.
    """

    models: list[Columns] = field(default_factory=list)
    updates: list[list[tuple[int, Tensor, float]]] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    dropped: list[list[int]] = field(default_factory=list)
    habits: list[list[tuple[Tensor, int]]] = field(default_factory=list)
    mu: list[float] = field(default_factory=list)
    late: list[tuple[list[int], int, int, int]] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)
    server: list[Tensor] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)  # that clients sent
    residuals: list[list[Tensor]] = field(default_factory=list)  # of error feedback, by client
    clipping_norms: list[float] = field(default_factory=list)  # under privacy


@dataclass
class Tally:
    """What a client has seen in a round, over all its batches."""

    examples: int = 0
    loss: float = 0.0
    weight: float = 0.0
    means: float = 0.0  # the mean losses of all batches, added up
    gradients: list[Tensor] = field(default_factory=list)  # of each step, after clipping


@dataclass
class Message:
    """What a client sent: when it arrives, the server's steps before it began, and what |a| is."""

    client: int
    update: Tensor
    weight: float
    finite: bool
    arrives: int
    version: int
    length: float = 0.0


@dataclass
class Mu:
    """FedProx's mu, as the training loss moves it (Li et al. 2020, Appendix C.3.3)."""

    value: float
    losses: list[float] = field(default_factory=list)  # since mu went down, without rises

    def follow(self, loss: float, step: float, patience: int) -> None:
        """Up by `step` on a rise, down after `patience` falls in a row, never below 0."""
        if math.isnan(loss):
            return
        if self.losses and loss > self.losses[-1]:
            self.value += step
        if self.losses and loss >= self.losses[-1]:
            self.losses = []
        self.losses.append(loss)
        if len(self.losses) > patience:
            self.value = max(self.value - step, 0.0)
            self.losses = [loss]


def federated_loop(
    module: nn.Module, loss: Loss, clients: list[Columns], setting: Setting
) -> Result:
    """Runs `setting.rounds` rounds on a copy of the module.

    clients: columns [n, ...] of each client, n may be 0; the module is called with column "x".
    loss: (output, batch) -> sums [b] and weights [b], one of each per example.
    """
    assert setting.algorithm in ("fedavg", "fedsgd", "habit", *MEMORY, "fednova")
    model = copy.deepcopy(module).train()
    for name, p in model.named_parameters(remove_duplicate=False):
        if setting.freeze and re.search(setting.freeze, name):
            p.requires_grad = False
    buffers = changing_buffers(model, loss, clients, setting)
    result = Result()
    moves: list[list[Tensor]] = [[] for _ in clients]
    server = Server(setting.server or ServerSetting(lr=setting.server_lr), trainable(model))
    mean, kept = [p.detach().double().clone() for p in trainable(model)], None
    plateaus = [p and Plateau(*p) for p in (setting.server_plateau, setting.client_plateau)]
    given, mu = setting, Mu(setting.dyn if setting.algorithm == "feddyn" else setting.mu)
    n, size = sum(p.numel() for p in trainable(model)), sum(sizes_of(model, buffers))
    memory, parts = Memory.zeros(len(clients), n), 2 if setting.algorithm == "scaffold" else 1
    shapes = parts * sizes_of(model, buffers)
    flight, waiting, version = list[Message](), list[Message](), 0
    residuals = [torch.zeros(parts * size).double() for _ in clients]
    mechanism = Mechanism(given.private, given.seed) if given.private else None
    for t in range(given.rounds):
        shares = [p.share if p else 1.0 for p in plateaus]
        setting = replace(scaled(given, shares[1]), mu=mu.value)
        members = cohort_of(setting, t, len(clients))
        updates, dropped, loss_sum, weight_sum, up = [], [], 0.0, 0.0, 0
        remembered = dict[int, Tensor]()
        for i, k in enumerate(members):
            place = Place(setting.seed, t, k, occurrence=members[:i].count(k))
            mine = habit_of(model, moves[k], buffers) if setting.algorithm == "habit" else None
            bias = {"scaffold": memory.server - memory.own[k], "feddyn": -memory.own[k]}
            update, weight, seen = client_update(
                model, loss, clients[k], setting, place, buffers, mine, bias.get(setting.algorithm)
            )
            new, tau, a = memory.own[k], len(seen.gradients), 0.0
            if setting.algorithm == "scaffold":
                new = new_variate(new, memory.server, update[:n], tau * [lr_of(setting, t)])
                if setting.option == 1 and tau:
                    again = Place(setting.seed, t, k, place.occurrence)
                    new = full_gradient(model, loss, clients[k], setting, again)
                change = torch.cat((new - memory.own[k], torch.zeros(size - n).double()))
                update, weight = torch.cat((update, change)), 1.0
            if setting.algorithm == "feddyn":
                new, weight = new - setting.dyn * -update[:n], 1.0
            if setting.algorithm == "fednova":
                beta = setting.momentum if setting.optimizer == "momentum" else 0.0
                a = sum(coefficients(tau, beta, lr_of(setting, t) * setting.mu))
                update[:n] /= a or 1.0
                weight = weight if tau else 0.0
            if setting.algorithm == "habit":
                weight *= 1 + len(moves[k])
            finite = math.isfinite(seen.loss) and bool(update.isfinite().all())
            if finite:
                loss_sum, weight_sum = loss_sum + seen.loss, weight_sum + seen.weight
                moves[k].append(-update[:size])
                remembered[k] = new
                for clip in setting.clips:
                    update = clip_message(update, *clip, shapes)
                wanted = update + residuals[k] if setting.feedback else update
                update, count = coded(setting, wanted, shapes, place)
                if weight > 0:
                    residuals[k] = wanted - update
                if mechanism:
                    clipped = partial(clip_message, sizes=shapes)
                    update = mechanism.message(update, weight, clipped)
                    weight = float(weight > 0)
                if setting.algorithm == "scaffold":
                    remembered[k] = memory.own[k] + update[size : size + n]
                if setting.algorithm == "feddyn":
                    remembered[k] = memory.own[k] + setting.dyn * update[:n]
            else:
                update, weight = torch.zeros_like(update), 0.0
                dropped.append(k)
                _, count = coded(setting, update, shapes, place)
            up += count
            updates.append((k, update, weight))
            late = delay_of(setting, place)
            flight.append(Message(k, update, weight, finite, t + late, version, weight * a))
        for k, new in remembered.items():
            memory.own[k] = new
        now = [m for m in flight if m.arrives == t]
        waiting += [aged(m, version, setting.discount) for m in now]
        ages = [version - m.version for m in now if m.weight > 0]
        flight = [m for m in flight if m.arrives > t]
        came = waiting if sum(m.weight > 0 for m in waiting) >= setting.buffer else []
        waiting, version = ([], version + 1) if came else (waiting, version)
        counts = (sum(m.weight > 0 for m in some) for some in (flight, waiting))
        result.late.append((ages, *counts, version))
        moved = [(m.client, m.update[:size].clone(), m.weight) for m in came]
        if setting.algorithm == "fednova" and came:
            for _, update, _ in moved:
                update[:n] *= sum(m.length for m in came) / sum(m.weight for m in came)
        mean_of = AGGREGATORS[setting.aggregator]
        sent, taken = [m.update for m in came if m.finite], float(sum(m.finite for m in came))
        if mechanism:
            # Without a message, noise is released just so.
            mean_of, taken = mechanism.mean(t), mechanism.promise.cohort
            sent.append(torch.zeros(parts * size).double())
            moved.append((-1, sent[-1][:size], 1.0))
            result.clipping_norms.append(mechanism.norm)
            mechanism.end_round(t)
        moving = server_step(model, moved, server, t, shares[0], buffers, mean_of)
        if setting.algorithm in MEMORY and sent:
            share, change = (
                taken / len(clients),
                mean_of(torch.stack(sent), torch.ones(len(sent), dtype=torch.float64)),
            )
            if setting.algorithm == "scaffold":
                memory.server = memory.server + share * change[size : size + n]
            else:
                memory.server = memory.server - setting.dyn * share * -change[:n]
                add_(trainable(model), -memory.server / setting.dyn)
        if moving:
            if setting.replay is not None:
                kept = replay(model, loss, setting.replay, setting.replay_data, t, kept)
            d = setting.ema or 0.0
            pairs = zip(mean, trainable(model), strict=True)
            mean = [d * m + (1 - d) * p.detach().double() for m, p in pairs]
        told = copy.deepcopy(model)
        for p, m in zip(trainable(told), mean, strict=True):
            p.data.copy_(m)
        result.models.append(told.state_dict())
        result.updates.append(updates)
        result.loss.append(loss_sum / weight_sum if weight_sum else math.nan)
        nobody = not dropped and not any(weight > 0 for *_, weight in updates)
        for plateau in filter(None, plateaus):
            if not (nobody and math.isnan(result.loss[-1])):
                plateau.look(result.loss[-1])
        result.dropped.append(dropped)
        result.mu.append(mu.value)
        result.bytes.append(up)
        result.residuals.append(list(residuals))
        if setting.adaptive is not None:
            mu.follow(result.loss[-1], *setting.adaptive)
        result.own.append(torch.stack(memory.own))
        result.server.append(memory.server)
        result.habits.append([(habit_of(model, m, buffers), len(m)) for m in moves])
    return result


def delay_of(s: Setting, at: Place) -> int:
    """How many rounds the message of the client at a place is late."""
    if not s.delays:
        return 0
    return philox.delay(s.seed, at.t, at.client, s.delays, at.occurrence)


def aged(message: Message, version: int, discount: float | None) -> Message:
    """A message as it counts on arrival, when the server has made `version` steps."""
    if discount is None:
        return message
    share = (1 + version - message.version) ** -discount
    return replace(message, update=message.update * share)


def lr_of(s: Setting, t: int) -> float:
    """The clients' learning rate in round t."""
    return float(s.lr(t)) if callable(s.lr) else s.lr


@torch.no_grad()
def add_(params: list[nn.Parameter], row: Tensor) -> None:
    """Add a row of all parameters to them, in place."""
    for p, part in zip(params, row.split([p.numel() for p in params]), strict=True):
        p += part.view_as(p).to(p.dtype)


def full_gradient(model: nn.Module, loss: Loss, data: Columns, s: Setting, place: Place) -> Tensor:
    """The gradient of the model on all examples with which the client at `place` takes part."""
    local, s = copy.deepcopy(model), replace(s, algorithm="fedsgd", last="keep")
    replace_dropout(local, place)
    (step,) = steps_of(kept_of(data, s, place), s, place)
    batches = [take(local, data, index) for index in step]
    return flat(mean_gradient(local, loss, batches, place, Tally(), s.augment))


def scaled(s: Setting, share: float) -> Setting:
    """The setting with the clients' learning rate times `share`."""
    lr = s.lr
    return replace(s, lr=(lambda t: share * lr(t)) if callable(lr) else share * lr)


def replay(
    model: nn.Module, loss: Loss, s: Setting, data: Columns, t: int, kept: dict | None
) -> dict:
    """Local training of the model itself, in place; the optimizer's state goes in and comes out."""
    place = Place(s.seed, t, 2**32 - 1)
    local = copy.deepcopy(model)
    replace_dropout(local, place)
    params = trainable(local)
    optimizer = make_optimizer(params, s, t)
    if kept is not None:
        lr = optimizer.param_groups[0]["lr"]
        optimizer.load_state_dict(kept)
        optimizer.param_groups[0]["lr"] = lr
    chosen = philox.subset(s.seed, t, place.client, len(data["x"]), s.cap)
    for step in steps_of(chosen, s, place):
        batches = [take(local, data, index) for index in step]
        grads = mean_gradient(local, loss, batches, place, Tally(), s.augment)
        factor = min(1.0, s.clip / float(flat(grads).norm())) if s.clip is not None else 1.0
        for p, g in zip(params, grads, strict=True):
            p.grad = g * factor
        optimizer.step()
    model.load_state_dict(local.state_dict())
    return copy.deepcopy(optimizer.state_dict())


def habit_of(model: nn.Module, moves: list[Tensor], buffers: list[str]) -> Tensor:
    """The mean of a client's moves [P], zero at first."""
    size = sum(sizes_of(model, buffers))
    return torch.stack([torch.zeros(size, dtype=torch.float64), *moves]).sum(0) / max(1, len(moves))


def sizes_of(model: nn.Module, buffers: list[str]) -> list[int]:
    """How many numbers of a message each tensor has."""
    named = dict(model.named_buffers())
    return [t.numel() for t in [*trainable(model), *(named[name] for name in buffers)]]


def clip_message(update: Tensor, per: str, limit: float, sizes: list[int]) -> Tensor:
    """The update [P] scaled to a norm of at most `limit`; by layer, each of its m tensors to
    limit / sqrt(m). 2^-36 of it is left free for rounding."""
    assert per in ("norm", "layer")
    parts = update.split(sizes) if per == "layer" else [update]
    bound = limit * (1 - 2.0**-36) / math.sqrt(len(parts))
    return torch.cat([part * min(1.0, bound / max(float(part.norm()), 1e-300)) for part in parts])


def coded(s: Setting, update: Tensor, sizes: list[int], at: Place) -> tuple[Tensor, int]:
    """What arrives of the update [P] of the client at `at`, and its bytes."""
    if not s.codec:
        return update, 8 * len(update)
    key = (s.seed, at.t, at.client, at.occurrence)
    parts = 2 if s.algorithm == "scaffold" else 1
    arrived, size = codecs.encode(s.codec, update.numpy(), sizes, parts, *key)
    return torch.from_numpy(arrived), size


def cohort_of(s: Setting, t: int, population: int) -> list[int]:
    """The clients of round t; one may stand there more than once."""
    if s.cohort is None:
        return list(range(population))
    if isinstance(s.cohort, int):
        return philox.cohort(s.sample_seed, t, population, s.cohort).tolist()
    return list(s.cohort[t])


def client_update(
    model: nn.Module,
    loss: Loss,
    data: Columns,
    s: Setting,
    place: Place,
    buffers: list[str],
    habit: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, float, Tally]:
    """The update [P] of the client at `place` (FedSGD: its gradient), its weight and its tally.

    It starts half its habit [P] away from the model; `bias` [trainable] is added to all gradients.
    """
    local, seen = copy.deepcopy(model), Tally()
    replace_dropout(local, place)
    params, start = trainable(local), trainable(model)
    at = 0
    for p in params if habit is not None else ():
        p.data += habit[at : at + p.numel()].view_as(p) / 2
        at += p.numel()
    sent = [w.double() - p.double() for w, p in zip(start, params, strict=True)]
    optimizer = make_optimizer(params, s, place.t)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, s.factor or (lambda step: 1.0))
    kept = kept_of(data, s, place)
    steps = steps_of(kept, s, place)
    for step in steps:
        batches = [take(local, data, index) for index in step]
        if s.examples is not None:
            grads = noised_gradient(local, loss, batches[0], place, seen, s)
        else:
            grads = mean_gradient(local, loss, batches, place, seen, s.augment)
        if s.algorithm == "fedsgd":
            sent = grads
            continue
        if s.clip is not None:
            factor = torch.clamp(s.clip / flat(grads).norm(), max=1.0)
            grads = [g * factor.to(g.dtype) for g in grads]
        seen.gradients.append(flat(grads))
        for p, w, g in zip(params, start, grads, strict=True):
            p.grad = g + s.mu * (p.detach() - w.detach())
        if bias is not None:
            add_([p.grad for p in params], bias)
        optimizer.step()
        schedule.step()
        sent = [w.double() - p.double() for w, p in zip(start, params, strict=True)]
    old, new = dict(model.named_buffers()), dict(local.named_buffers())
    update = flat(sent + [old[name].double() - new[name].double() for name in buffers])
    if s.weighting:
        return update, dga_weight(flat(sent), seen, s), seen
    n = len(kept) // s.batch * s.batch if s.last == "drop" else len(kept)
    return update, client_weight(n if steps else 0, seen, s), seen


def kept_of(data: Columns, s: Setting, at: Place) -> philox.Ints:
    """The examples of a client that take part in a round."""
    n, cap = len(data["x"]), s.cap
    if s.token_cap is not None and n:
        tokens = [int((y != -100).sum()) for y in data["y"]]
        most = philox.token_prefix(s.seed, at.t, at.client, tokens, s.token_cap, at.occurrence)
        cap = most if cap is None else min(cap, most)
    return philox.subset(s.seed, at.t, at.client, n, cap, at.occurrence)


def dga_weight(update: Tensor, seen: Tally, s: Setting) -> float:
    """a_k of DGA, for the update [trainable] of a client."""
    if not seen.weight > 0:
        return 0.0
    numbers = update if s.weighting.startswith("update_") else torch.cat(seen.gradients)
    x = {
        "loss": seen.loss / seen.weight,
        "flute_loss": seen.means / seen.weight,
        "variance": float(numbers.var(correction=0)),
        "mean": float(numbers.mean()),
        "rms": float(numbers.norm()) / math.sqrt(len(numbers)),
        "uniform": 0.0,
    }[s.weighting.removeprefix("update_")]
    return min(100.0, math.exp(-s.softmax_beta * x))


def client_weight(n: int, seen: Tally, s: Setting) -> float:
    """a_k: the weight of a client with n examples in the mean of the round."""
    if s.weight == "uniform":
        return 1.0
    if s.weight == "capped":
        return float(min(n, s.weight_cap or 0))
    if s.weight == "tokens":
        return n * seen.weight / seen.examples if seen.examples else 0.0
    assert s.weight == "examples"
    return float(n)


@torch.no_grad()
def server_step(
    model: nn.Module,
    updates: list[tuple[int, Tensor, float]],
    server: Server,
    t: int,
    share: float,
    buffers: list[str],
    mean_of: Callable[[Tensor, Tensor], Tensor],
) -> bool:
    """The server's step by the mean update; buffers become the mean of the clients' buffers.

    Whether there was a mean.
    """
    total = sum(weight for _, _, weight in updates)
    if total == 0:
        return False
    counted = [(update, weight) for _, update, weight in updates if weight > 0]
    messages, weights = zip(*counted, strict=True)
    delta = mean_of(torch.stack(messages), torch.tensor(weights, dtype=torch.float64))
    named, params = dict(model.named_buffers()), trainable(model)
    targets = params + [named[name] for name in buffers]
    pieces = delta.split([target.numel() for target in targets])
    pieces = [piece.reshape(to.shape) for to, piece in zip(targets, pieces, strict=True)]
    server.step(params, pieces[: len(params)], t, share)
    for target, piece in zip(targets[len(params) :], pieces[len(params) :], strict=True):
        value = target.double() - piece
        target.copy_(value if target.is_floating_point() else value.round())
    return True


def weighted_mean(messages: Tensor, weights: Tensor) -> Tensor:
    return (messages * weights[:, None]).sum(0) / weights.sum()


def median(messages: Tensor, weights: Tensor) -> Tensor:
    return torch.from_numpy(np.median(messages.numpy(), axis=0))


def trimmed(messages: Tensor, weights: Tensor) -> Tensor:
    """The mean of each number without a fifth of the clients at either end."""
    out = len(messages) // 5
    columns = [sorted(column.tolist()) for column in messages.T]
    return torch.tensor([np.mean(c[out : len(c) - out]) for c in columns])


AGGREGATORS = {"": weighted_mean, "median": median, "trimmed": trimmed}


def steps_of(kept: philox.Ints, s: Setting, at: Place) -> list[list[philox.Ints]]:
    """A client's optimizer steps, each the batches (of example numbers) that it adds up."""
    if s.algorithm == "fedsgd":
        s = replace(s, epochs=1, steps=None, random_epochs=None, full=True)
    steps: list[list[philox.Ints]] = []
    epoch, epochs = 0, s.epochs if s.epochs is not None else 0
    limit = s.steps[at.client] if isinstance(s.steps, tuple) else s.steps
    if isinstance(epochs, tuple):
        epochs = epochs[at.client]
    if s.random_epochs is not None:
        epochs = philox.amount(s.seed, at.t, at.client, *s.random_epochs, at.occurrence)
    while epoch < epochs if limit is None else len(steps) < limit:
        order = philox.shuffle(s.seed, at.t, at.client, epoch, len(kept), at.occurrence)
        batches = batches_of(kept[order], s)
        if not batches:
            break
        steps += [batches] if s.full else [[batch] for batch in batches]
        epoch += 1
    return steps[:limit]


def batches_of(order: philox.Ints, s: Setting) -> list[philox.Ints]:
    """Cuts an epoch's order into batches; `last` says what happens to a short last one."""
    assert s.last in ("keep", "drop", "wrap")
    n, b = len(order), s.batch
    if s.last == "drop":
        order = order[: n // b * b]
    elif s.last == "wrap":
        order = order[np.arange(-(-n // b) * b) % max(n, 1)]
    return [order[i : i + b] for i in range(0, len(order), b)]


def mean_gradient(
    local: nn.Module,
    loss: Loss,
    batches: list[Columns],
    place: Place,
    seen: Tally,
    transforms: Transforms = (),
) -> list[Tensor]:
    """Gradient of (sum of loss sums) / (sum of weights) over batches; zero without any weight."""
    params = trainable(local)
    grads, total = [torch.zeros_like(p) for p in params], 0.0
    for batch in batches:
        place.next_batch()
        if transforms:
            x = torch.from_numpy(augment(batch["x"].double().numpy(), transforms, place))
            batch = batch | {"x": x.to(batch["x"].dtype)}
        sums, weights = loss(local(batch["x"]), batch)
        # A parameter that the loss does not reach has gradient zero; the optimizer still steps it.
        parts = torch.autograd.grad(sums.sum(), params, allow_unused=True, materialize_grads=True)
        grads = [g + part for g, part in zip(grads, parts, strict=True)]
        weight = float(weights.double().sum())
        total += weight
        seen.examples += len(batch["x"])
        seen.loss += float(sums.detach().double().sum())
        seen.weight += weight
        seen.means += float(sums.detach().double().sum()) / weight if weight else 0.0
    return [g / total if total else torch.zeros_like(g) for g in grads]


def noised_gradient(
    local: nn.Module, loss: Loss, batch: Columns, place: Place, seen: Tally, s: Setting
) -> list[Tensor]:
    """What Algorithm 1 of Abadi et al. (CCS 2016, arXiv:1607.00133) makes of a batch.

    The batch is cut into micro-batches of one example. The gradient of each, of its loss sum over
    its weight, is clipped to C; their sum, with noise of standard deviation z C, is divided by the
    batch size of the setting. What is not finite is left out.
    """
    assert s.examples is not None
    (clip, z), params = s.examples, trainable(local)
    place.next_batch()
    if s.augment:
        x = torch.from_numpy(augment(batch["x"].double().numpy(), s.augment, place))
        batch = batch | {"x": x.to(batch["x"].dtype)}
    total = torch.zeros(sum(p.numel() for p in params)).double()
    for i in range(len(batch["x"])):
        place.only(i)
        one = {name: column[i : i + 1] for name, column in batch.items()}
        value, weight = loss(local(one["x"]), one)
        parts = torch.autograd.grad(value.sum(), params, allow_unused=True, materialize_grads=True)
        count = float(weights) if (weights := weight.double().sum()) > 0 else math.inf
        g = flat(list(parts)) / count
        if g.isfinite().all():
            total += g / max(1.0, float(g.norm()) / (clip * (1 - 2.0**-36)))  # room for rounding
        seen.examples += 1
        if value.isfinite().all():
            seen.loss += float(value.detach().double().sum())
            seen.weight += float(weights)
    at = {"t": place.t, "client": place.client, "occurrence": place.occurrence}
    noise = philox.normals(s.seed, len(total), **at, layer=255, step=place.step)
    total = (total + z * clip * torch.from_numpy(noise)) / s.batch
    pieces = total.split([p.numel() for p in params])
    return [piece.view_as(p).to(p.dtype) for piece, p in zip(pieces, params, strict=True)]


def take(model: nn.Module, data: Columns, index: philox.Ints) -> Columns:
    """The examples `index` of every column: floats in the model's dtype, bytes in 0..1."""
    dtype = next(model.parameters()).dtype
    batch = {name: column[torch.from_numpy(index)] for name, column in data.items()}
    if batch["x"].dtype == torch.uint8:
        batch["x"] = batch["x"].to(dtype) / 255
    return {name: c.to(dtype) if c.is_floating_point() else c for name, c in batch.items()}


def make_optimizer(params: list[nn.Parameter], s: Setting, t: int) -> torch.optim.Optimizer:
    lr = lr_of(s, t)
    match s.optimizer:
        case "sgd":
            return torch.optim.SGD(params, lr, weight_decay=s.decay)
        case "momentum" | "nesterov":
            ahead = s.optimizer == "nesterov"
            return torch.optim.SGD(params, lr, s.momentum, weight_decay=s.decay, nesterov=ahead)
        case "adam":
            return torch.optim.Adam(params, lr, s.betas, s.eps, s.decay)
        case "rmsprop":
            return torch.optim.RMSprop(params, lr, s.alpha, s.eps, s.decay)
        case "centered":
            return torch.optim.RMSprop(params, lr, s.alpha, s.eps, s.decay, s.momentum, True)
        case "adagrad":
            return torch.optim.Adagrad(params, lr, weight_decay=s.decay, eps=s.eps)
        case "adamw":
            return torch.optim.AdamW(params, lr, s.betas, s.eps, s.weight_decay)
    raise ValueError(f"unknown optimizer {s.optimizer!r}")


def changing_buffers(model: nn.Module, loss: Loss, clients: list[Columns], s: Setting) -> list[str]:
    """Names of the buffers that a training forward pass changes, tried out on one batch."""
    trial, place = copy.deepcopy(model), Place(s.seed, 0, 0)
    replace_dropout(trial, place)
    data = next((data for data in clients if len(data["x"]) > 0), None)
    if data is None:
        return []
    batch = take(trial, data, np.arange(min(s.batch, len(data["x"]))))
    mean_gradient(trial, loss, [batch], place, Tally())
    after = dict(trial.named_buffers())
    return [name for name, old in model.named_buffers() if not torch.equal(old, after[name])]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def flat(tensors: list[Tensor]) -> Tensor:
    """All numbers of the tensors in one row [P] of float64."""
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])
