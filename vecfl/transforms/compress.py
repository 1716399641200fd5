"""Compression of what clients send: a codec as a transform, with or without error feedback.

A row that is not finite has no code: it stays as it is, so that the client is dropped, and counts
the bytes of a row of zeros.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Finished, Metrics, Round, Server, Upload
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.transforms.base import Transform, nothing_kept, nothing_told
from vecfl.transforms.codec import Codec, Senders, encode
from vecfl_kernels import row_largest

Told = Callable[[Server, Aggregate, Round], Metrics]


def compressed(
    name: str,
    codec: Callable[[int], Codec],
    *,
    unfit: str = "",
    init: Callable[[Layout], Server] = nothing_kept,
    metrics: Told = nothing_told,
) -> Transform:
    """Clients send `codec` (of a round, from 0) of their messages.

    unfit  why error feedback cannot go with it; "" where |x - C(x)| is at most |x|
    """

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        update, size = through(codec(done.round.number), upload.update, done)
        return replace(upload, update=update, bytes=size)

    return Transform(name, client, init=init, metrics=metrics, codec=codec, unfit=unfit)


def error_feedback(transform: Transform) -> Transform:
    """Each client adds to its message what the codec lost of its earlier ones, and keeps the rest.

    EF-SGD: Karimireddy et al., ICML 2019, arXiv:1901.09847, Algorithm 1: p = update + residual is
    sent as C(p), and p - C(p) is the residual of the client's next round. Clients that are not
    drawn, are lost, are dropped or have the weight 0 keep theirs. The codec must be contractive,
    |x - C(x)| at most |x|; raises InputError for others, with the reason, and for what is no codec.
    """
    if not isinstance(transform, Transform):
        raise InputError(f"error_feedback({transform!r}): expected a codec, such as top_k(0.01)")
    codec = transform.codec
    if codec is None or transform.table(1):
        what = "has residuals already" if codec is not None else "is no codec"
        raise InputError(f"error_feedback: {transform.name} {what}; give top_k(0.01) or the like")
    if transform.unfit:
        raise InputError(f"error_feedback: {transform.name} {transform.unfit}")

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        before, counts = done.table["residual"], upload.weight[:, None] > 0
        wanted = upload.update + before
        update, size = through(codec(done.round.number), wanted, done)
        kept = {"residual": (wanted - update).where(counts, before)}
        return replace(upload, update=update, bytes=size, table=kept)

    name = f"error_feedback {transform.name}"
    return replace(transform, name=name, client=client, table=lambda size: {"residual": (size,)})


def through(codec: Codec, rows: Tensor, done: Finished) -> tuple[Tensor, Tensor]:
    """What arrives of the messages [K, M], and their bytes [K]."""
    at = done.round
    senders = Senders(at.seed, at.number, done.client, done.occurrence, at.layout)
    if rows.is_cpu and rows.sum(1).isfinite().all():  # a finite sum, finite terms
        return encode(codec, rows, senders)
    finite = row_largest(rows).isfinite()[:, None]
    arrived, size = encode(codec, rows.where(finite, 0), senders)
    return arrived.where(finite, rows), size
