"""How the updates of a sample of clients lie to one another.

Axes: s clients of the sample, P numbers of an update.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vecfl.mesh import Mesh

COLUMNS = 1 << 14  # of all updates, that are multiplied at a time


def gram(mesh: Mesh, where: np.ndarray, rows: Sequence[Tensor], size: int, length: int) -> Tensor:
    """The products [s, s] of `size` updates with one another, float64, on the CPU.

    where, rows  which of the s this rank has, and their updates, each [length]; all ranks get the
                 same bits, whoever has which
    """
    device = rows[0].device if rows else torch.device("cpu")
    result = torch.zeros(size, size, dtype=torch.float64)
    for first in range(0, length if size else 0, COLUMNS):
        width = min(COLUMNS, length - first)
        block = torch.zeros(size, width, dtype=torch.float64, device=device)
        for place, row in zip(where.tolist(), rows, strict=True):
            block[place] = row[first : first + width].double()
        (block,) = mesh.sum(block)
        result += (block @ block.T).cpu()
    return result


def cosines(products: Tensor) -> Tensor:
    """The cosines [s, s] between updates, NaN where one of the two is zero."""
    length = products.diagonal().sqrt()
    both = torch.outer(length, length)
    return torch.where(both > 0, products / both, torch.nan).clamp(-1, 1)


def diversity(products: Tensor) -> float:
    """Gradient diversity: sum |u_k|^2 / |sum u_k|^2 (Yin et al., AISTATS 2018, arXiv:1706.05699,
    Definition 1). 1/s for equal updates, 1 for orthogonal ones; NaN where the sum is zero.
    """
    together = float(products.sum())
    return float(products.trace()) / together if together > 0 else np.nan


def effective_rank(products: Tensor) -> float:
    """exp of the entropy of the singular values, divided by their sum, of the updates as a matrix
    (Roy and Vetterli, EUSIPCO 2007, Definition 1). From 1 to s; NaN where all updates are zero.
    """
    squares = torch.linalg.eigvalsh(products)
    largest = squares.amax() if len(squares) else squares.sum()
    if not largest > 0:
        return np.nan
    # of a singular value that is zero, rounding leaves about eps times the largest square
    some = squares[squares > len(squares) * torch.finfo(torch.float64).eps * largest].sqrt()
    share = some / some.sum()
    return float((-(share * share.log()).sum()).exp())
