"""Clipping by the sum of absolute numbers, which Laplace noise goes by.

Dwork et al., TCC 2006, on the Laplace mechanism: its scale is in proportion to the L1 sensitivity.
"""

import math

from torch import Tensor

from vecfl.algorithms.base import Finished, Server, Upload
from vecfl.errors import positive
from vecfl.rows import LEFT
from vecfl.transforms.base import Limit, Transform
from vecfl.transforms.clip import counted, told
from vecfl.transforms.numbers import total
from vecfl_kernels import row_largest, scaled_rows, unit


def clip_by_l1(norm: float) -> Transform:
    """Scale the message of a client so that its absolute numbers add up to at most `norm`.

    inf: never. The bound and the metrics are as those of `clip_by_norm`, of this norm. Raises
    InputError for a norm that is not positive.
    """
    positive("clip_by_l1(norm)", norm)

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        update, length, over = clip_l1_rows(upload.update, norm)
        return counted(upload, update, length, over)

    limit = Limit(lambda own: float(norm), order=1) if math.isfinite(norm) else None
    return Transform(f"clip_by_l1 {float(norm)}", client, metrics=told, limit=limit)


def clip_l1_rows(rows: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [K, n] whose absolute numbers add up to at most `limit`, as `clip_rows` for the norm."""
    by = unit(row_largest(rows))
    length = total(rows / by[:, None])[:, 0]  # as it is, the sum could be infinite
    norm, left = length * by, limit * LEFT[rows.dtype]
    over = ~(norm <= left)  # of a NaN, too
    return scaled_rows(rows, by, (left / length).to(rows.dtype), over), norm, over
