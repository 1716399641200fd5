"""Some numbers at random: Stich et al., NeurIPS 2018, arXiv:1809.07599, definition 2.2; with the
factor M / k as Konecny et al. 2016, arXiv:1610.05492, section 3, has it.
"""

import torch
from torch import Tensor

from vecfl.transforms.base import Transform
from vecfl.transforms.codec import Code, Codec
from vecfl.transforms.compress import compressed
from vecfl.transforms.numbers import greatest
from vecfl.transforms.parts import amount, check_amount, fits
from vecfl.transforms.top_k import as_integers, as_they_are


def random_k(k: int | float, scaled: bool = True) -> Transform:
    """k numbers of a message, or of each of several, drawn for each client and round, else 0.

    k       a number of them, or as a float a share in (0, 1], of which there is one at least
    scaled  times M / k, so that the mean is the message; else contractive in the mean,
            E |x - C(x)|^2 = (1 - k / M) |x|^2, and never longer

    The server draws the same positions, so the numbers alone are sent. Raises InputError as
    `top_k` does. A number that M / k takes out of the range drops its client.
    """
    check_amount("random_k", k)

    def drawn(n: int, words: Tensor | None) -> Tensor:
        assert words is not None
        return greatest(-words, amount(k, n))

    def some(x: Tensor, words: Tensor | None) -> Code:
        return Code(as_integers(x), kept=drawn(x.shape[1], words))

    def restore(code: Code, dtype: torch.dtype) -> Tensor:
        numbers, n = as_they_are(code, dtype), code.symbols.shape[1]
        return numbers * (n / amount(k, n)) if scaled else numbers

    codec = Codec(some, restore, "message", scales=0, width=None, kept=drawn, draws=True)
    name = f"random_k {k}{' scaled' if scaled else ''}"
    unfit = "is scaled by M / k, so it is not contractive; take scaled=False" if scaled else ""
    return compressed(name, lambda round: codec, init=fits("random_k", k), unfit=unfit)
