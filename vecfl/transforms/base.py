"""What happens to messages between clients and server: transforms, chained around an algorithm."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Algorithm, Finished, Gradient, Metrics, Round, Server, Upload
from vecfl.algorithms.carrying import named, others, part
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.transforms.checks import check_upload
from vecfl.transforms.codec import Codec


def sent_as_it_is(own: Server, done: Finished, upload: Upload) -> Upload:
    """Clients' messages stay as they are."""
    return upload


def summed_as_it_is(own: Server, sums: Aggregate, round: Round) -> tuple[Aggregate, Server]:
    """The aggregate stays as it is."""
    return sums, own


def nothing_kept(layout: Layout) -> Server:
    """The server keeps nothing for it."""
    return {}


def no_columns(size: int) -> dict[str, tuple[int, ...]]:
    """Clients keep nothing for it."""
    return {}


def nothing_told(own: Server, sums: Aggregate, round: Round) -> Metrics:
    """It has no metrics."""
    return {}


@dataclass(frozen=True)
class Limit:
    """How a transform bounds what a client sends.

    norm   own state -> the bound of the message's norm; order: of the norm, 2 or 1
    count_noise  standard deviation of the noise on its sum "below": 1/2 of each client within the
           bound, -1/2 of each other; 0 where it has no such sum
    adapt  (own state, the share of clients within the bound, with noise) -> own state
    """

    norm: Callable[[Server], float]
    order: int = 2
    count_noise: float = 0.0
    adapt: Callable[[Server, float], Server] | None = None


@dataclass(frozen=True)
class Transform:
    """A change of everything that clients send: all messages of a client are one row [K, M].

    name    with what the result depends on, such as "clip 1.0": it tells runs apart
    client  (own state, Finished, Upload) -> Upload, on rows of clients that have finished; `table`
            holds the transform's own columns, and `extra` the numbers that it has added up
    server  (own state, Aggregate, Round) -> (Aggregate, own state), with its own `extra` sums
    init    Layout -> own state, tensors by name: they are part of the run's state. Here and in
            `Round.layout` it is the layout of a message
    table   M -> {column: shape}, what clients keep for it
    metrics (own state before the round, Aggregate, Round) -> {name: number}
    codec   round -> Codec, where the client side encodes: what it gives cannot be changed any more
    unfit   why error feedback cannot stand around the codec; "" where it can
    bound   where all that it does is `clip_by_norm`: the norm
    limit   where it bounds what clients send: how
    """

    name: str
    client: Callable[[Server, Finished, Upload], Upload] = field(default=sent_as_it_is, repr=False)
    server: Callable[[Server, Aggregate, Round], tuple[Aggregate, Server]] = field(
        default=summed_as_it_is, repr=False
    )
    init: Callable[[Layout], Server] = field(default=nothing_kept, repr=False)
    table: Callable[[int], dict[str, tuple[int, ...]]] = field(default=no_columns, repr=False)
    metrics: Callable[[Server, Aggregate, Round], Metrics] = field(default=nothing_told, repr=False)
    codec: Callable[[int], Codec] | None = field(default=None, repr=False)
    unfit: str = ""
    bound: float | None = None
    limit: Limit | None = None


def chain(algorithm: Algorithm, *transforms: Transform) -> Algorithm:
    """`algorithm` whose clients' messages pass through transforms on their way.

    Their client sides act in this order on the rows of each client, weights not yet applied; their
    server sides act on the sums in reverse order, before the algorithm's own server. A chain may be
    chained further, but not one of delayed messages. A metric that is told already gets the place
    of the transform behind its name. Raises InputError for a client side behind a codec: bytes are
    those of what was encoded. So it is for all behind a private algorithm, whose clip and noise are
    the last.
    """
    if transforms and algorithm.delay is not None:
        raise InputError(f"{algorithm.name}: chain first, and let delayed stand around all of it")
    for transform in transforms:
        if algorithm.privacy is not None:
            raise InputError(
                f"{transform.name} stands behind {algorithm.name}: there it could undo the clip, "
                "or see sums without their noise; chain first, and make it private last"
            )
        if algorithm.coded and transform.client is not sent_as_it_is:
            raise InputError(
                f"{transform.name} stands behind a codec ({algorithm.name}): what is encoded "
                "cannot change any more; put one codec last"
            )
        if transform.limit and transform.limit.adapt and transform.server is summed_as_it_is:
            raise InputError(
                f"{transform.name}: its norm follows a count under vecfl.private alone; give it "
                "there, or take clip_by_norm"
            )
        algorithm = around(algorithm, of_message(transform, algorithm.messages))
    return algorithm


def around(inner: Algorithm, transform: Transform) -> Algorithm:
    """`inner` with one more transform, whose names begin with its place and name."""
    place, prefix = inner.places, f"{inner.places}.{transform.name}."

    def table(layout: Layout) -> dict[str, tuple[int, ...]]:
        return inner.table(layout) | named(prefix, transform.table(layout.size))

    def upload(server: Server, done: Finished) -> Upload:
        sent = inner.upload(others(prefix, server), replace(done, table=others(prefix, done.table)))
        own = part(prefix, server)
        mine = replace(done, table=part(prefix, done.table), place=place)
        changed = transform.client(own, mine, replace(sent, table={}, extra={}))
        check_upload(transform.name, changed, sent)
        kept = sent.table | kept_of(inner, transform, done, changed.update)
        table, extra = named(prefix, changed.table), named(prefix, changed.extra)
        return replace(changed, table=kept | table, extra=sent.extra | extra)

    def step(server: Server, sums: Aggregate, round: Round) -> Server:
        mine = replace(sums, extra=part(prefix, sums.extra))
        changed, own = transform.server(part(prefix, server), mine, round)
        changed = replace(changed, extra=others(prefix, sums.extra))
        return inner.server(others(prefix, server), changed, round) | named(prefix, own)

    def metrics(server: Server, sums: Aggregate, round: Round) -> Metrics:
        mine, rest = (replace(sums, extra=of(prefix, sums.extra)) for of in (part, others))
        told = inner.metrics(others(prefix, server), rest, round)
        own = transform.metrics(part(prefix, server), mine, round)
        return {**told, **{n if n not in told else f"{n}.{place}": v for n, v in own.items()}}

    def observe(server: Server, seen: Metrics) -> Server:
        assert inner.observe is not None
        return inner.observe(others(prefix, server), seen) | named(prefix, part(prefix, server))

    return replace(
        inner,
        name=f"{inner.name}, {transform.name}",
        init=lambda w, layout: inner.init(w, layout) | named(prefix, transform.init(layout)),
        begin=lambda server, starting: inner.begin(
            others(prefix, server), replace(starting, table=others(prefix, starting.table))
        ),
        upload=upload,
        server=step,
        table=table,
        local=lambda server, rule: inner.local(others(prefix, server), rule),
        model=lambda server: inner.model(others(prefix, server)),
        metrics=metrics,
        observe=observe if inner.observe else None,
        coded=inner.coded or transform.codec is not None,
        places=place + 1,
    ).sends(gradient_of(inner, transform, prefix))


def gradient_of(inner: Algorithm, transform: Transform, prefix: str) -> Gradient | None:
    """`Algorithm.gradient` behind a transform: what is clipped, or stays as it is, still is one."""
    gradient = inner.one_gradient
    if gradient is None or transform.client is sent_as_it_is:
        return gradient
    if transform.bound is None:
        return None
    return replace(gradient, clips=(*gradient.clips, (prefix, transform.bound)))


def kept_of(inner: Algorithm, transform: Transform, done: Finished, sent: Tensor) -> Server:
    """The rows of clients that go by what is sent [K, M], where a transform may have changed it."""
    if inner.keeps is None or transform.client is sent_as_it_is:
        return {}
    return inner.keeps(done.table, sent, done.round.layout)


def of_message(transform: Transform, messages: tuple[str, ...]) -> Transform:
    """`transform`, to which the layout of a row is that of a message of these parts."""

    def seen(round: Round) -> Round:
        return replace(round, layout=round.layout.of_message(messages))

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        return transform.client(own, replace(done, round=seen(done.round)), upload)

    return replace(
        transform,
        init=lambda layout: transform.init(layout.of_message(messages)),
        table=lambda size: transform.table(size * len(messages)),
        client=sent_as_it_is if transform.client is sent_as_it_is else client,
        server=lambda own, sums, round: transform.server(own, sums, seen(round)),
        metrics=lambda own, sums, round: transform.metrics(own, sums, seen(round)),
    )
