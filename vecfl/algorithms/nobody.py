"""What an algorithm's clients send, looked at without any client."""

import torch
from torch import Tensor

from vecfl.algorithms.base import Algorithm, Finished, Round, Upload
from vecfl.engine import Slots
from vecfl.layout import Layout


def nobody(algorithm: Algorithm, w: Tensor, layout: Layout) -> Upload:
    """The upload of no clients at all, from the model w [P]: it shows shapes and names."""
    slots = Slots(layout, algorithm.rule, 1, w.device, w.dtype)
    rows = {name: w.new_zeros(0, *shape) for name, shape in algorithm.table(layout).items()}
    whole = torch.zeros(0, dtype=torch.int64, device=w.device)
    done = Finished(
        round=Round(0, 0, layout),
        model=slots.flat[:0],
        state=[t[:0] for t in slots.state],
        bias=None if slots.bias is None else slots.bias[:0],
        client=whole,
        occurrence=whole,
        examples=whole,
        loss=slots.sums[:0, 0],
        weight=slots.sums[:0, 1],
        seen=slots.seen[:0],
        table=rows,
        statistics=None if slots.statistics is None else slots.statistics.of(slice(0, 0)),
        steps=whole,
        before=None if algorithm.before is None else slots.flat[:0],
    )
    return algorithm.upload(algorithm.init(w, layout), done)
