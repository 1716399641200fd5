"""Signs with one scale: Bernstein et al. 2018, arXiv:1802.04434; Karimireddy et al., ICML 2019,
arXiv:1901.09847, section 4.
"""

from typing import Literal

import torch
from torch import Tensor

from vecfl.transforms.base import Transform
from vecfl.transforms.codec import Code, Codec
from vecfl.transforms.compress import compressed
from vecfl.transforms.numbers import room, total
from vecfl.transforms.parts import check_per


def scaled_sign(per: Literal["tensor", "message"] = "tensor") -> Transform:
    """The mean absolute value of every tensor, or of the message, with the sign of each number.

    A bit for each number, 1 from 0 upwards, behind one scale. Contractive, where x has n numbers:
    |x - C(x)|^2 = (1 - |x|_1^2 / (n |x|^2)) |x|^2. Raises InputError for another `per`.
    """
    check_per("scaled_sign", per)
    codec = Codec(signs, signed, per, scales=1, width=1)
    return compressed(f"scaled_sign per {per}", lambda round: codec)


def signs(x: Tensor, words: Tensor | None) -> Code:
    by = room(x)
    mean = total(x / by) / x.shape[1] * by.double()
    return Code(x >= 0, (mean.to(x.dtype),))


def signed(code: Code, dtype: torch.dtype) -> Tensor:
    (scale,) = code.scales
    return code.symbols.to(dtype).mul_(2).sub_(1).mul_(scale)
