"""What the options of codecs mean."""

from collections.abc import Callable

from vecfl.algorithms.base import Server
from vecfl.errors import InputError, is_integer
from vecfl.layout import Layout


def check_per(what: str, per: str) -> None:
    """InputError unless `per` says what the parts are."""
    if per not in ("tensor", "message"):
        raise InputError(f'{what}(per={per!r}): expected "tensor" or "message"')


def check_bits(what: str, bits: int) -> None:
    """InputError unless `bits` is a width of symbols."""
    if not is_integer(bits) or not 1 <= bits <= 16:
        raise InputError(f"{what}: expected 1 to 16 bits, got {bits!r}")


def check_amount(what: str, k: int | float) -> None:
    """InputError unless k is a number of entries, or a share of them."""
    if not (k >= 1 if is_integer(k) else isinstance(k, float) and 0 < k <= 1):
        raise InputError(f"{what}({k!r}): expected a number from 1, or a share such as 0.01")


def amount(k: int | float, n: int) -> int:
    """How many of n numbers k says."""
    return int(k) if is_integer(k) else max(1, round(k * n))


def fits(what: str, k: int | float) -> Callable[[Layout], Server]:
    """The `init` of a codec that keeps k numbers of a message: there must be so many."""

    def init(layout: Layout) -> Server:
        size = layout.size // layout.parts
        if k > size:
            raise InputError(f"{what}({k}): a message has {size} numbers")
        return {}

    return init
