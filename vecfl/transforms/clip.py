"""Clipping of what clients send, over all of it or by tensor.

McMahan et al., ICLR 2018, arXiv:1710.06963, section 2.1: flat and per-layer clipping. Whatever is
sent is bounded: changes of buffers that training changes count as the parameters do.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Finished, Metrics, Round, Server, Upload
from vecfl.errors import InputError, positive
from vecfl.layout import Layout
from vecfl.rows import LEFT, lengths
from vecfl.transforms.base import Limit, Transform
from vecfl_kernels import scaled_rows, unit


def clip_by_norm(norm: float) -> Transform:
    """Scale the message of a client so that its norm is at most `norm`; inf: never.

    The bound holds for the norm in float64 of what is sent: 2^-22 of it in float32, 2^-36 in
    float64 is left free for rounding. Metrics: `train/clipped`, the share of clients with a
    positive weight that were scaled, and `train/norm`, the mean of their norms before. Raises
    InputError for a norm that is not positive.
    """
    positive("clip_by_norm(norm)", norm)

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        update, length, over = clip_rows(upload.update, norm)
        return counted(upload, update, length, over)

    limit = Limit(lambda own: float(norm)) if math.isfinite(norm) else None
    return Transform(f"clip_by_norm {float(norm)}", client, metrics=told, bound=norm, limit=limit)


def clip_by_layer(norm: float | Mapping[str, float]) -> Transform:
    """Scale each tensor of a message so that its norm is at most its own bound.

    norm  a bound of the whole message, of which each of m tensors gets norm / sqrt(m); or the bound
          of each parameter and changing buffer by name

    Metrics as those of `clip_by_norm`; clipped are clients with a tensor that was scaled. Raises
    InputError for a bound that is not positive, and, when a run starts, for names that are not
    those of the model.
    """
    bounds = dict(norm) if isinstance(norm, Mapping) else {"": norm}
    for bound in bounds.values():
        positive("clip_by_layer(norm)", bound)

    def init(layout: Layout) -> Server:
        names = {e.name for e in layout.params + layout.buffers}
        if isinstance(norm, Mapping) and names != bounds.keys():
            wrong = min(names ^ bounds.keys())
            what = "has no bound" if wrong in names else "is no parameter or changing buffer"
            raise InputError(f"clip_by_layer(norm): {wrong!r} {what}; give one for each")
        return {}

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        entries = [e for e in done.round.layout.params + done.round.layout.buffers if e.size]
        share = 1 / math.sqrt(len(entries))
        update = upload.update.clone()
        norms, over = [], torch.zeros_like(upload.weight, dtype=torch.bool)
        for e in entries:
            part = slice(e.offset, e.offset + e.size)
            bound = bounds[e.name] if isinstance(norm, Mapping) else norm * share
            update[:, part], length, scaled = clip_rows(update[:, part], bound)
            norms.append(length)
            over |= scaled
        return counted(upload, update, lengths(torch.stack(norms, 1)), over)

    said = bounds if isinstance(norm, Mapping) else float(norm)
    whole = math.hypot(*bounds.values())
    limit = Limit(lambda own: whole) if math.isfinite(whole) else None
    return Transform(f"clip_by_layer {said}", client, init=init, metrics=told, limit=limit)


def clip_rows(rows: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [K, n] of norm at most `limit`; their norms before, float64 [K]; which [K] were scaled.

    A row that is not finite stays so. What of a scaled row would be denormal, and could only be
    rounded coarsely, becomes 0.
    """
    norm = lengths(rows)
    over = ~(norm <= limit * LEFT[rows.dtype])  # of a NaN, too
    if rows.is_cpu and not over.any():  # asking a GPU would wait for it
        return rows, norm, over
    return scaled_rows(rows, *clip_factors(rows, norm, limit), over), norm, over


def clip_factors(rows: Tensor, norm: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """What rows of these norms are divided by, without error, and then multiplied by: [K] and [K].

    As they are, what is left of 1e30 or 1e-30 could be 0 or infinite.
    """
    by = unit(norm.to(rows.dtype))
    wide = rows.dtype == torch.float32  # its norm is a number of float64, that of 1e308 is not
    length = norm / by if wide else lengths(rows / by[:, None])
    return by, (limit * LEFT[rows.dtype] / length).to(rows.dtype)


def counted(upload: Upload, update: Tensor, norm: Tensor, over: Tensor) -> Upload:
    """`upload` with another update, and what `told` makes metrics of."""
    some = upload.weight > 0
    extra = {"clients": some, "clipped": some & over, "norm": norm.where(some, 0)}
    return replace(upload, update=update, extra=extra)


def told(own: Server, sums: Aggregate, round: Round) -> Metrics:
    """The share of clients that were clipped, and their mean norm; NaN without any."""
    clients, clipped, norm = (float(sums.extra[n]) for n in ("clients", "clipped", "norm"))
    clients = clients or math.nan
    return {"train/clipped": clipped / clients, "train/norm": norm / clients}
