"""The largest numbers alone: Stich et al., NeurIPS 2018, arXiv:1809.07599, definition 2.2."""

import torch
from torch import Tensor

from vecfl.transforms.base import Transform
from vecfl.transforms.bits import AS_INTEGER
from vecfl.transforms.codec import Code, Codec
from vecfl.transforms.compress import compressed
from vecfl.transforms.numbers import greatest
from vecfl.transforms.parts import amount, check_amount, fits


def top_k(k: int | float) -> Transform:
    """The k numbers of a message that are largest in absolute value; of equal ones the first.

    k  a number of them, or as a float a share in (0, 1], of which there is one at least

    Of each of several messages (SCAFFOLD), whose numbers differ in size. Their positions are sent,
    or a bit for every number where that is shorter; then the numbers. Contractive: |x - C(x)|^2 is
    at most (1 - k / M) |x|^2. Raises InputError for another k, and for more numbers than a message
    has, when a run starts.
    """
    check_amount("top_k", k)

    def largest(x: Tensor, words: Tensor | None) -> Code:
        kept = greatest(x.abs(), amount(k, x.shape[1]))
        return Code(as_integers(x), kept=kept)

    kept = lambda n, words: amount(k, n)  # noqa: E731
    codec = Codec(largest, as_they_are, "message", scales=0, width=None, kept=kept)
    return compressed(f"top_k {k}", lambda round: codec, init=fits("top_k", k))


def as_integers(x: Tensor) -> Tensor:
    """The bits of numbers [K, n]."""
    return x.contiguous().view(AS_INTEGER[x.dtype])


def as_they_are(code: Code, dtype: torch.dtype) -> Tensor:
    """The numbers that are kept, 0 elsewhere."""
    numbers = code.symbols.to(AS_INTEGER[dtype]).view(dtype)
    return numbers if code.kept is None else numbers.where(code.kept, 0)
