"""What an algorithm is: a few functions about rows and one model.

Axes: K finished rows, P numbers in a row, M = P len(messages) numbers in a message. A row is the
trainable parameters, then the buffers that training changes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.delays import Delay
from vecfl.engine.rule import LocalRule, Statistics
from vecfl.layout import Layout
from vecfl.privacy.events import ExamplePrivacy, Privacy

Server = dict[str, Tensor]
Metrics = Mapping[str, float | int | str]
Aggregator = Callable[[Tensor, Tensor], Tensor]  # (messages [C, M], weights [C]) -> [M]

# Names in the server's state of what was learned from metrics: it stays where a run falls back.
OBSERVED = "observed/"


@dataclass(frozen=True)
class Round:
    """Where a call stands.

    number  of the round, from 0
    seed    of the run, which keys draws
    layout  of a row: its first `trainable` numbers are parameters, the rest changing buffers; for
            a transform of a message, in which further parts stand behind them
    clients N, of the whole population
    """

    number: int
    seed: int
    layout: Layout
    clients: int = 0


@dataclass(frozen=True)
class Starting:
    """Clients that start: `client` [K], positions in the dataset, and their rows of the table.

    table  {column: [K, ...]}
    """

    round: Round
    client: Tensor
    table: dict[str, Tensor]


@dataclass(frozen=True)
class Begin:
    """How clients start: `model` [P] or [K, P], and a correction row `bias` [K, trainable]."""

    model: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Finished:
    """Rows of clients that have finished.

    model     [K, P]; state: optimizer tensors, each [K, trainable]; bias [K, trainable] or None
    client    [K] positions in the dataset; occurrence [K] how often each stood before in the cohort
    examples  [K] how many an epoch visits
    loss, weight  [K] float64 sums over all batches; seen [K] examples visited, with repetition
    statistics    what the rule collects of its steps (`vecfl.engine.rule.Statistics`), or None
    table     {column: [K, ...]}, the clients' rows as they were when they started
    steps     [K] int64 optimizer steps, each with learning rate `lr`
    before    [K, P] what they sent in the pass before (`Algorithm.before`), or None
    place     to a transform: how many there are before it in the chain
    """

    round: Round
    model: Tensor
    state: list[Tensor]
    bias: Tensor | None
    client: Tensor
    occurrence: Tensor
    examples: Tensor
    loss: Tensor
    weight: Tensor
    seen: Tensor
    table: dict[str, Tensor] = field(default_factory=dict)
    statistics: Statistics | None = None
    steps: Tensor = field(default_factory=lambda: torch.empty(0))
    lr: float = 0.0
    before: Tensor | None = None
    place: int = 0


@dataclass(frozen=True)
class Upload:
    """What clients send, `update` [K, M] with `weight` [K] float64, and what they keep.

    table  {column: [K, ...]}, their new rows; a client is finite where both update and rows are
    extra  {name: [K]}, numbers that are added up over the finite clients, without weights
    log_weight  [K] float64: a client counts weight * exp(log_weight), in range or not. An
           algorithm gives it always or never
    bytes  [K] int64, how many the update takes on its way; None: those of its M numbers
    """

    update: Tensor
    weight: Tensor
    table: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    log_weight: Tensor | None = None
    bytes: Tensor | None = None


def no_table(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Clients keep nothing between rounds."""
    return {}


def as_it_is(server: Server, rule: LocalRule) -> LocalRule:
    """Clients train by the same rule in every round."""
    return rule


def the_model(server: Server) -> Tensor:
    """The model that clients start from is the one that is evaluated and kept."""
    return server["w"]


def no_metrics(server: Server, sums: Aggregate, round: Round) -> Metrics:
    """Nothing to tell of a round."""
    return {}


@dataclass(frozen=True)
class Gradient:
    """What a client sends where it takes one plain step from the model of the round: its gradient.

    weights  Finished -> [K], how much it counts
    scale    what the gradient is multiplied by; None: the learning rate of the round
    clips    bounds of the norm of the message, in turn, each with the prefix of its extra sums
    about    begin, upload and rule of the algorithm that it tells of: who replaces one of them has
             said nothing of the new one
    """

    weights: Callable[[Finished], Tensor] = field(repr=False)
    scale: float | None = None
    clips: tuple[tuple[str, float], ...] = ()
    about: tuple[object, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm as a value.

    name    as the recipes call it
    rule    how a client trains
    init    (w [P], Layout) -> server state; its entry "w" is the model that clients start from
    begin   (server state, Starting) -> Begin
    upload  (server state, Finished) -> Upload
    server  (server state, Aggregate, Round) -> server state
    table   Layout -> {column: shape}: what each client keeps from one round to its next, zero at
            first
    local   (server state, rule) -> the rule of this round: its numbers may differ, not its parts
    model   server state -> the model [P] that is evaluated and kept
    metrics (server state before the round, Aggregate, Round) -> {name: number}
    observe (server state, the metrics of a round) -> server state; None where nobody looks
    keeps   (rows {column: [K, ...]}, what is sent [K, M], Layout) -> the rows that clients keep
            where transforms have changed what they send; None: what `upload` says
    delay   how long messages are on their way (`vecfl.delayed`); None: they arrive in their round
    aggregator  what the server makes of messages (`vecfl.aggregated_by`); None: the weighted mean
    messages  the parts of what a client sends, one behind the other, each as long as a row; the
            first is of the model
    before  an algorithm by which the cohort passes over its examples, once, before it trains: what
            its `upload` gives as update [K, P] is not added up, it comes as `Finished.before`. A
            rank holds it for the clients that it trains
    downlink  how many rows of P numbers each client of a cohort receives
    gradient  what a client that takes one plain step sends; None: something else
    max_weight  the most that a client may count; None: there is no bound, or nobody knows it
    privacy what it promises (`vecfl.private`); None: nothing
    examples  what its clients promise about single examples (`vecfl.dp_sgd`); None: nothing
    coded   whether what clients send has been through a codec, behind which nothing may change it
    facts   plain values that results depend on, besides name and rule: they tell runs apart
    places  how many transforms are chained around it: names of each begin with its place
    """

    name: str
    rule: LocalRule
    init: Callable[[Tensor, Layout], Server] = field(repr=False)
    begin: Callable[[Server, Starting], Begin] = field(repr=False)
    upload: Callable[[Server, Finished], Upload] = field(repr=False)
    server: Callable[[Server, Aggregate, Round], Server] = field(repr=False)
    table: Callable[[Layout], dict[str, tuple[int, ...]]] = field(default=no_table, repr=False)
    local: Callable[[Server, LocalRule], LocalRule] = field(default=as_it_is, repr=False)
    model: Callable[[Server], Tensor] = field(default=the_model, repr=False)
    metrics: Callable[[Server, Aggregate, Round], Metrics] = field(default=no_metrics, repr=False)
    observe: Callable[[Server, Metrics], Server] | None = field(default=None, repr=False)
    keeps: Callable[[Server, Tensor, Layout], Server] | None = field(default=None, repr=False)
    delay: Delay | None = None
    aggregator: Aggregator | None = field(default=None, repr=False)
    messages: tuple[str, ...] = ("model",)
    before: "Algorithm | None" = field(default=None, repr=False)
    downlink: int = 1
    gradient: Gradient | None = field(default=None, repr=False)
    max_weight: float | None = None
    privacy: Privacy | None = None
    examples: ExamplePrivacy | None = None
    coded: bool = False
    facts: Mapping[str, object] = field(default_factory=dict, repr=False)
    places: int = 0

    def moves(self, sums: Aggregate) -> bool:
        """Whether the server steps by these sums: a private one does in every round."""
        return sums.counts or self.privacy is not None

    def promises(self, privacy: Privacy | None) -> "Algorithm":
        """The same algorithm, which promises this as it is now (`vecfl.private`)."""
        about = (self.upload, self.server)
        return replace(self, privacy=privacy and replace(privacy, about=about))

    @property
    def keeps_promise(self) -> bool:
        """Whether nobody has replaced what the promise is about."""
        parts = (self.upload, self.server)
        return self.privacy is None or all(
            a is b for a, b in zip(parts, self.privacy.about, strict=True)
        )

    def sends(self, gradient: Gradient | None) -> "Algorithm":
        """The same algorithm, which tells what its clients of one plain step send."""
        about = (self.begin, self.upload, self.rule)
        return replace(self, gradient=gradient and replace(gradient, about=about))

    @property
    def one_gradient(self) -> Gradient | None:
        """`gradient`, if it is about this algorithm."""
        parts, g = (self.begin, self.upload, self.rule), self.gradient
        known = g is not None and all(a is b for a, b in zip(parts, g.about, strict=True))
        return g if known else None
