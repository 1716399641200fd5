"""Whatever is sent, its norm is at most C: in exact arithmetic, for numbers of any size.

Norms are sums of fractions. What is below C stays as it is, and what is clipped keeps its length.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vecfl
from vecfl.algorithms import Upload
from vecfl.privacy.events import Privacy
from vecfl.transforms import Transform
from vecfl.transforms.private import noised
from vecfl.worker import finite

from .messages import finished, layout_of, sent
from .worlds import UNIFORM, WORK

TYPES = (torch.float32, torch.float64)
SIZE = 6
# How far exponents of 2 reach: those of numbers, denormal ones too, and those of bounds, below
# which a clipped number would be denormal and becomes 0.
NUMBERS = {torch.float32: (-150, 127), torch.float64: (-1075, 1023)}
BOUNDS = {torch.float32: (-90, 120), torch.float64: (-900, 1000)}
SPARE = {torch.float32: Fraction(1, 10**6), torch.float64: Fraction(1, 10**10)}
GIVEN = {"a": 1.0, "b": 0.25, "c": 3.0}
Part = tuple[slice, float]
Made = Callable[[float], Transform]
CLIPS: dict[str, Made] = {
    "norm": vecfl.clip_by_norm,
    "layer": vecfl.clip_by_layer,
    "bounds": lambda c: vecfl.clip_by_layer({name: c * by for name, by in GIVEN.items()}),
    "adaptive": lambda c: vecfl.adaptive_clip(c, count_noise=1.0),
    "l1": vecfl.clip_by_l1,
}


def parts_of(clip: str, bound: float) -> list[Part]:
    """What is clipped for itself, and to what."""
    layout = layout_of(SIZE)
    tensors = [(e.name, slice(e.offset, e.offset + e.size)) for e in layout.params + layout.buffers]
    if clip == "layer":
        return [(part, bound / math.sqrt(3)) for _, part in tensors]
    if clip == "bounds":
        return [(part, bound * GIVEN[name]) for name, part in tensors]
    return [(slice(0, SIZE), bound)]


def exact(row: Tensor, order: int) -> Fraction:
    """The sum of absolute numbers, or of squares."""
    total = sum(abs(Fraction(v)) ** order for v in row.tolist())
    return Fraction(total)


def holds(clip: str, bound: float, before: Tensor, after: Tensor) -> None:
    """No finite row is longer than the bound, nor shorter than it must be."""
    order = 1 if clip == "l1" else 2
    transform = CLIPS[clip](bound)
    promised = transform.limit
    assert promised is not None and promised.order == order
    whole = promised.norm(transform.init(layout_of(SIZE)))
    assert exact(after, order) <= Fraction(whole) ** order
    for part, each in parts_of(clip, bound):
        was, limit = exact(before[part], order), Fraction(each) ** order
        if was <= limit * (1 - 3 * SPARE[before.dtype]):
            assert torch.equal(after[part], before[part])
        if was > limit:
            assert exact(after[part], order) >= limit * Fraction(999, 1000) ** order
    assert (after * before >= 0).all()


def numbers(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Of any size alike; zeros among them."""
    low, high = NUMBERS[dtype]
    sized = st.builds(math.ldexp, st.floats(-1.75, 1.75, width=32), st.integers(low, high))
    return st.just(0.0) | st.just(-0.0) | sized


def rows(dtype: torch.dtype) -> st.SearchStrategy[list[float]]:
    """Numbers of any size beside each other, and numbers of one size."""
    low, high = NUMBERS[dtype]
    alike = st.builds(
        lambda mantissas, e: [math.ldexp(m, e) for m in mantissas],
        st.lists(st.floats(-1.75, 1.75, width=32), min_size=SIZE, max_size=SIZE),
        st.integers(low, high),
    )
    return alike | st.lists(numbers(dtype), min_size=SIZE, max_size=SIZE)


def bounds(dtype: torch.dtype) -> st.SearchStrategy[float]:
    return st.builds(math.ldexp, st.floats(1, 1.75), st.integers(*BOUNDS[dtype])) | st.just(1.0)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_no_message_is_longer_than_the_bound(dtype: torch.dtype, clip: str) -> None:
    biggest, tiny = torch.finfo(dtype).max, 2.0 ** max(NUMBERS[dtype][0] + 1, -1074)

    @settings(max_examples=80, deadline=None)
    @given(rows(dtype), bounds(dtype))
    @example([biggest] * SIZE, 1.0)
    @example([biggest] * SIZE, 2.0**100)
    @example([biggest, 1.0, tiny, -tiny, 0.0, -biggest], 1.0)
    @example([tiny] * SIZE, 1.0)
    @example([0.0] * SIZE, 1.0)
    @example([1 / 3] * SIZE, 1.0)
    def check(values: list[float], bound: float) -> None:
        row = torch.tensor([values], dtype=dtype)
        holds(clip, bound, row[0], sent(CLIPS[clip](bound), row).update[0])

    check()


ALGORITHMS: dict[str, Callable[[], vecfl.Algorithm]] = {
    "uniform": lambda: vecfl.fedavg(weights=UNIFORM, **WORK),
    "capped": lambda: vecfl.fedavg(weights=vecfl.capped(5), **WORK),
    "dga": lambda: vecfl.dga(max_weight=2.0, **WORK),
}


def privately(name: str, clip: Transform, row: Tensor, share: float) -> Upload:
    """What the client side of `private` sends for a row whose weight is a share of the largest."""
    algorithm, done = ALGORITHMS[name](), finished(row)
    most, one = algorithm.max_weight, torch.ones(len(row), dtype=torch.float64)
    assert most is not None and clip.limit is not None
    mechanism = "gaussian" if clip.limit.order == 2 else "laplace"
    part = noised(clip, clip.limit, Privacy(mechanism, 1.0, 4.0, 1e-3), algorithm)
    upload = Upload(row, one * share * most)
    if name == "dga":  # whose weights are logs
        upload = Upload(row, one, log_weight=(one * share * most).log())
    return part.client(clip.init(done.round.layout), done, upload)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_weight_makes_a_message_longer(name: str, clip: str) -> None:
    """The weight is in the row before it is clipped; a share of 0.4 of (3, 4, 0, ...) is 2 long."""
    dtype = torch.float32 if name == "capped" else torch.float64

    @settings(max_examples=30, deadline=None)
    @given(rows(dtype), bounds(dtype), st.sampled_from([1.0, 0.4, 1e-30, 0.0]))
    @example([3.0, 4.0, 0.0, 0.0, 0.0, 0.0], 2.5, 0.4)
    @example([torch.finfo(dtype).max] * SIZE, 1.0, 1e-30)
    def check(values: list[float], bound: float, share: float) -> None:
        row = torch.tensor([values], dtype=dtype)
        after = privately(name, CLIPS[clip](bound), row, share)
        assert after.weight.tolist() == [float(share > 0)] and after.log_weight is None
        most = ALGORITHMS[name]().max_weight or 0.0
        amount = torch.tensor(share * most, dtype=torch.float64)
        amount = amount.log().exp() if name == "dga" else amount
        before = row[0] * (amount / most).to(dtype)
        holds(clip, bound, before, after.update[0])

    check()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_not_finite_stays_so_and_is_dropped(dtype: torch.dtype, clip: str) -> None:
    """NaN and infinity in one number; the row beside them is what it is alone."""
    good = torch.linspace(-4, 5, SIZE, dtype=dtype)
    bad = good.repeat(3, 1)
    bad[0, 2], bad[1, 0], bad[2, 5] = math.nan, math.inf, -math.inf
    table = torch.cat((bad, good[None]))
    alone = sent(CLIPS[clip](1.0), good[None]).update[0]
    for found in (sent(CLIPS[clip](1.0), table), privately("uniform", CLIPS[clip](1.0), table, 1)):
        assert not found.update[:3].isfinite().all(1).any()
        assert torch.equal(found.update[3], alone)
        ok, kept = finite(finished(table), found)
        assert ok.tolist() == [False, False, False, True]
        assert not kept.update[:3].any() and kept.weight.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_long_rows_add_up_to_the_bound_at_most(dtype: torch.dtype) -> None:
    """A third is rounded in every entry alike; fsum rounds once."""
    size = 100_001
    table = torch.stack((torch.full((size,), 1 / 3), torch.linspace(-1, 1, size))).to(dtype)
    for bound in (1.0, 1 / 3, 1e-3):
        after = sent(vecfl.clip_by_l1(bound), table).update
        for row in after.abs().tolist():
            assert 0.999 * bound <= math.fsum(row) <= bound


def test_l1_rows_by_hand() -> None:
    """3 + 4 + 1 is 8: at most 2 is a quarter of each. 0.5 and nothing stay as they are. The sum of
    four times 1e308 is no number of float64, and a quarter of 1e308 for each is."""
    rows = torch.tensor(
        [[3, -4, 1, 0], [0, 0.5, 0, 0], [0, 0, 0, 0], [1e308] * 4], dtype=torch.float64
    )
    found = sent(vecfl.clip_by_l1(2.0), rows)
    assert found.update[0].tolist() == pytest.approx([0.75, -1, 0.25, 0], rel=1e-9)
    assert torch.equal(found.update[1:3], rows[1:3])
    assert found.update[3].tolist() == pytest.approx([0.5] * 4)
    assert found.extra["norm"][:3].tolist() == [8, 0.5, 0]
    assert found.extra["clipped"].tolist() == [True, False, False, True]
    assert sent(vecfl.clip_by_l1(1e308), rows).update[3].tolist() == pytest.approx([0.25e308] * 4)
    endless = vecfl.clip_by_l1(math.inf)
    assert torch.equal(sent(endless, rows).update, rows) and endless.limit is None


def test_the_noise_of_tiny_and_huge_layers_is_not_lost() -> None:
    """Squares of 1e-200 and 1e200 leave the range; the bound of both tensors together does not."""
    for size in (1e-200, 1e200):
        limit = vecfl.clip_by_layer({"a": 3 * size, "b": 4 * size}).limit
        assert limit is not None and limit.norm({}) == pytest.approx(5 * size)
