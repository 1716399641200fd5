"""Clipping by the sum of absolute numbers, which Laplace noise goes by.

Dwork et al., TCC 2006, on the Laplace mechanism: its scale is in proportion to the L1 sensitivity.
"""

from vecfl.algorithms.base import Finished, Server, Upload
from vecfl.errors import positive
from vecfl.transforms.base import Limit, Transform
from vecfl.transforms.clip import LEFT, counted, told
from vecfl_kernels import scaled_rows, unit


def clip_by_l1(norm: float) -> Transform:
    """Scale the message of a client so that its absolute numbers add up to at most `norm`.

    Metrics as those of `clip_by_norm`, of this norm. Raises InputError for a norm that is not
    positive.
    """
    positive("clip_by_l1(norm)", norm)

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        rows = upload.update
        length = rows.abs().sum(1, dtype=rows.double().dtype)
        limit = norm * LEFT[rows.dtype]
        over = ~(length <= limit)  # of a NaN, too
        by = unit(length.to(rows.dtype))
        scaled = scaled_rows(rows, by, (limit / (length / by)).to(rows.dtype), over)
        return counted(upload, scaled, length, over)

    limit = Limit(lambda own: float(norm), order=1)
    return Transform(f"clip_by_l1 {float(norm)}", client, metrics=told, limit=limit)
