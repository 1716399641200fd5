"""PrivUnit2 and ScalarDP: their epsilon by their densities, and that their mean is the message.

Statistical tests have fixed seeds; the false-alarm probabilities that they state are over seeds.
"""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

import vecfl
from vecfl import InputError
from vecfl.transforms.privunit import cap_of, directions, levels, scalars

from .messages import finished, layout_of, sent

SIZES = (2, 3, 10, 1000, 100_000, 1_000_000)
EPSILONS = (0.01, 0.5, 4.0, 20.0, 90.0)


def edges(size: int, share: np.ndarray) -> np.ndarray:
    """What a coordinate of a uniform direction exceeds with these chances.

    By Student's law: t sqrt((d - 1) / (1 - t^2)) of a coordinate t has d - 1 degrees of freedom.
    """
    s = stats.t.isf(share, size - 1)
    return s / np.sqrt(size - 1 + s * s)


def edge(size: int, share: float) -> float:
    """Gamma of a cap."""
    return float(edges(size, np.array(share)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("e", EPSILONS)
def test_two_densities_are_e_to_the_epsilon_apart(size: int, e: float) -> None:
    """On the cap and elsewhere, over those of the uniform law: no point of the sphere has another
    density under any direction, so epsilon is the logarithm of their ratio, and not less."""
    cap = cap_of(size, e)
    inside, outside = (1 - cap.far) / cap.share, cap.far / (1 - cap.share)
    assert math.log(inside / outside) == pytest.approx(e, rel=1e-11)
    assert math.log(inside / outside) <= e * (1 + 1e-11)
    assert 0 < cap.mean < 1 and 0 < cap.share < 0.5


@pytest.mark.parametrize("size", [3, 10, 1000, 1_000_000])
def test_the_caps_of_the_paper_are_wider(size: int) -> None:
    """Their first condition on the rest e of epsilon, for the same chance of the cap: gamma at most
    tanh(e / 2) sqrt(pi / (2 (d - 1))). The exact quantile is above it, and so is its mean."""
    cap = cap_of(size, 4.0)
    rest = math.log(1 / cap.share - 1)  # what is left for the cap
    gamma = math.tanh(rest / 2) * math.sqrt(math.pi / (2 * (size - 1)))
    assert gamma <= edge(size, cap.share)


@pytest.mark.parametrize("size", [2, 3, 10, 1000])
@pytest.mark.parametrize("e", [0.5, 4.0, 20.0])
def test_the_mean_is_the_integral(size: int, e: float) -> None:
    """Over the quantiles of the uniform law, those of the cap and all others, by midpoints."""
    cap, u = cap_of(size, e), (np.arange(100_000) + 0.5) / 100_000
    near, rest = (edges(size, q).mean() for q in (cap.share * u, 1 - (1 - cap.share) * u))
    assert cap.mean == pytest.approx((1 - cap.far) * near + cap.far * rest, rel=1e-4)


@pytest.mark.parametrize("size", [100_000, 1_000_000, 100_000_000])
@pytest.mark.parametrize("e", EPSILONS)
def test_in_many_dimensions_a_coordinate_is_normal(size: int, e: float) -> None:
    """sqrt(d) t is standard normal, with E[x; x > z] = phi(z): it leaves (z^4 + 3) / d out."""
    cap = cap_of(size, e)
    z = stats.norm.isf(cap.share)
    right = stats.norm.pdf(z) * ((1 - cap.far) / cap.share - cap.far / (1 - cap.share))
    assert cap.mean * math.sqrt(size) == pytest.approx(right, rel=max(1e-6, (z**4 + 3) / size))


@pytest.mark.parametrize("size", [3, 1000])
def test_no_other_share_has_a_larger_mean(size: int) -> None:
    """By Student's law, for any coin c of the 8: a density of ratio e^8 whose edge is elsewhere."""

    def mean(c: float) -> float:
        share, far = special.expit(c - 8), special.expit(-c)
        gamma, alpha = edge(size, share), (size - 1) / 2
        moment = (1 - gamma**2) ** alpha / (2 * alpha * special.beta(alpha, 0.5))
        return float(moment * ((1 - far) / share - far / (1 - share)))

    best = max(mean(c) for c in np.linspace(0.05, 7.95, 400))
    assert cap_of(size, 8.0).mean == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(("size", "e"), [(2, 1.0), (3, 4.0), (50, 4.0), (20_000, 9.0)])
def test_directions_have_their_law(size: int, e: float) -> None:
    """Each pair of coins, on a grid of 100 x 100, gives its quantile: V is in the cap in a share
    1 - far of all, and there and elsewhere as the uniform law is."""
    cap, n = cap_of(size, e), 100
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    coins = torch.cartesian_prod(grid, grid)[:: 1 if size < 100 else 50]
    u = torch.zeros(len(coins), size, dtype=torch.float64)
    u[:, 0] = 1
    g = torch.randn(len(coins), size, generator=torch.Generator().manual_seed(1)).double()
    v = directions(u, cap, coins, g) * cap.mean
    torch.testing.assert_close(v.norm(dim=1), torch.ones(len(v)).double(), rtol=1e-12, atol=0)
    t = v[:, 0].numpy()
    near = t >= edge(size, cap.share)
    assert near.mean() == pytest.approx(1 - cap.far, abs=1 / n)
    above = stats.t.sf(t * np.sqrt((size - 1) / np.maximum(1 - t * t, 1e-300)), size - 1)
    right = np.where(near, cap.share * coins[:, 1], 1 - (1 - cap.share) * coins[:, 1])
    np.testing.assert_allclose(above, right, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("length", [0.3, 4.0, 0.0])
def test_the_mean_of_what_arrives_is_the_clipped_message(length: float) -> None:
    """20,000 clients: each coordinate within 5 standard errors (p = 6e-7, of 6 each)."""
    row = torch.tensor([3.0, -1, 0, 0.5, -2, 1], dtype=torch.float64)
    row *= length / row.norm()
    drawn = sent(vecfl.privunit2(8.0, 0.5), row.expand(20_000, -1)).update
    right = row * min(1, 0.5 / max(length, 1e-9))
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert (error < 0.05).all()
    assert ((drawn.mean(0) - right).abs() < 5 * error).all()


def angles(rows: Tensor) -> np.ndarray:
    """Of the last two coordinates, over a whole turn."""
    return (torch.atan2(rows[:, 4], rows[:, 5]) / (2 * math.pi) % 1).numpy()


def test_v_is_symmetric_about_the_message() -> None:
    """Across a message along the first axis all directions are alike: angles of two others are
    uniform (Kolmogorov-Smirnov, p > 1e-6), and the length of what arrives has a few values."""
    rows = torch.zeros(20_000, 6, dtype=torch.float64)
    rows[:, 0] = 0.4
    drawn = sent(vecfl.privunit2(8.0, 0.5), rows, seed=1).update
    signs = drawn[:, 0].sign()  # of a length, which may be below 0
    assert stats.kstest(angles(drawn * signs[:, None]), "uniform").pvalue > 1e-6


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_epsilon_is_split_between_direction_and_norm(share: float) -> None:
    """|V / mean| is 1 / mean of the direction's part, so what arrives is one of the k + 1 numbers
    of the norm's part, over that mean."""
    rows = torch.full((400, 6), 0.1, dtype=torch.float64)
    drawn = sent(vecfl.privunit2(8.0, 0.5, norm_share=share), rows).update.norm(dim=1)
    k, e = levels(share * 8), math.exp(share * 8)
    told = [(j - k * (k + 1) / 2 / (e + k)) * (e + k) / (e - 1) / k * 0.5 for j in range(k + 1)]
    found = sorted({round(v, 9) for v in (drawn * cap_of(6, (1 - share) * 8).mean).tolist()})
    assert found == pytest.approx(sorted({round(abs(v), 9) for v in told}), abs=1e-8)


def test_direction_and_norm_are_drawn_independently() -> None:
    """What 20,000 clients tell whose norm is between two levels: in which eighth <V, u> is, and
    which level (p > 1e-6 by chi squared). e^e = 2 for the norm, k = 2: levels (j - 3/4) 2."""
    e = math.log(2)
    rows = torch.zeros(20_000, 6, dtype=torch.float64)
    rows[:, 0] = 0.25  # of 1: half of level 1
    drawn = sent(vecfl.privunit2(4 * e, 1.0, norm_share=0.25), rows).update * cap_of(6, 3 * e).mean
    told = torch.tensor([-1.5, 0.5, 2.5], dtype=torch.float64)
    off, level = (drawn.norm(dim=1)[:, None] - told.abs()).abs().min(1)
    assert float(off.max()) < 1e-9 and (level.bincount() > 4000).all()
    size = (drawn[:, 0] / told[level]).argsort().argsort() // 2500
    counts = (size * 3 + level).bincount().view(8, 3)
    assert stats.chi2_contingency(counts.numpy()).pvalue > 1e-6


@pytest.mark.parametrize("e", [0.05, 0.8, 4.0, 10.0, 30.0])
def test_no_number_is_told_more_than_e_to_the_epsilon_as_likely(e: float) -> None:
    """The second coin tells the truth above w = k / (e^e + k), and below it the third one tells
    each other level as often. So chances are 1 - w and w / k, e^e apart, and the mean is the truth.
    """
    k, each = levels(e), 5
    assert k == math.ceil(math.exp(e / 3))
    w = k / (math.exp(e) + k)
    assert math.log((1 - w) / (w / k)) == pytest.approx(e, rel=1e-9)
    which = (torch.arange(k * each, dtype=torch.float64) + 0.5) / (k * each)
    for at in (0, k // 2, k):
        truth = torch.full_like(which, at / k)
        half = torch.full_like(which, 0.5)
        lies, truths = (
            scalars(truth, e, torch.stack((half, torch.full_like(half, w * by), which), 1))
            for by in (1 - 1e-9, 1 + 1e-9)
        )
        values, counts = lies.unique(return_counts=True)
        assert len(values) == k and (counts == each).all() and not (lies == truths[0]).any()
        assert (truths == truths[0]).all()
        mean = (1 - w) * float(truths[0]) + w * float(lies.mean())
        assert mean == pytest.approx(at / k, rel=1e-9, abs=1e-9)


def test_scalars_by_hand() -> None:
    """e^e = 8, k = 2: the truth with 8/10, each other with 1/10. Told j has the mean 0.7 j + 0.3,
    so the numbers are (j - 0.3) / 0.7 / 2. Of 0.3, at 0.6 of level 1, coins up to 0.4 make 0."""
    e = math.log(8)
    coins = torch.tensor(
        [[0.39, 0.21, 0.5], [0.41, 0.21, 0.5], [0.39, 0.19, 0.4], [0.39, 0.19, 0.6]],
        dtype=torch.float64,
    )
    told = scalars(torch.full((4,), 0.3).double(), e, coins)
    assert told.tolist() == pytest.approx([(j - 0.3) / 1.4 for j in (0, 1, 1, 2)])


def test_rounding_to_levels_is_not_biased() -> None:
    """The first coin on a grid of 10,000, and nobody tells another: the mean is x itself."""
    n = 10_000
    coins = torch.stack([(torch.arange(n) + 0.5).double() / n, *torch.ones(2, n).double()], 1)
    for x in (0.0, 0.123, 0.5, 0.977, 1.0):
        told = scalars(torch.full((n,), x).double(), 4.0, coins)
        k, e = levels(4.0), math.exp(4.0)
        at = told * k * (e - 1) / (e + k) + k * (k + 1) / 2 / (e + k)
        assert at.round().tolist() == pytest.approx(at.tolist(), abs=1e-9)
        assert float(at.mean()) / k == pytest.approx(x, abs=1 / n)
        assert at.min().round() >= 0 and at.max().round() <= k


def test_a_message_of_many_numbers() -> None:
    """10^6 of them: the length is that of one of the levels over the mean, and V leans to u."""
    g = torch.Generator().manual_seed(3)
    row = torch.randn(1, 1_000_000, generator=g, dtype=torch.float32)
    drawn = sent(vecfl.privunit2(20.0, 1.0), row).update.double()
    mean, k, e = cap_of(1_000_000, 18.0).mean, levels(2.0), math.exp(2.0)
    told = float(drawn.norm()) * mean * (e - 1) / (e + k) * k
    assert min(abs(told - abs(j - k * (k + 1) / 2 / (e + k))) for j in range(k + 1)) < 1e-6
    cosine = float((drawn * row).sum() / drawn.norm() / row.norm())
    assert abs(cosine) > 0.5 * mean


def test_coins_have_sixty_four_bits() -> None:
    """Chances of e^-30 need more than a word: the first coins of 2,000 clients are no multiples."""
    from vecfl.transforms.privunit import fair

    coins = fair(finished(torch.zeros(2000, 3)), 5)
    assert coins.shape == (2000, 5) and ((coins > 0) & (coins < 1)).all()
    assert ((coins * 2**32 - 0.5) % 1 != 0).all()
    assert stats.kstest(coins.flatten().numpy(), "uniform").pvalue > 1e-6
    assert abs(float(np.corrcoef(coins.T)[np.triu_indices(5, 1)].max())) < 5 / math.sqrt(2000)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: vecfl.privunit2(0, 1),
            "privunit2(epsilon) must be positive and finite, not 0",
        ),
        (
            lambda: vecfl.privunit2(1, math.inf),
            "privunit2(longest) must be positive and finite, not inf",
        ),
        (lambda: vecfl.privunit2(101, 1), "privunit2(epsilon) must be at most 100, not 101"),
        (
            lambda: vecfl.privunit2(1, 1, norm_share=1.0),
            "privunit2(norm_share) must be between 0 and 1, not 1.0",
        ),
        (
            lambda: vecfl.privunit2(90, 1, norm_share=0.5),
            "privunit2(norm_share): at most 30 is for the norm, not 45",
        ),
        (
            lambda: vecfl.privunit2(1, 1).init(layout_of(1)),
            "privunit2: a message of 1 numbers has no direction; take 2 or more",
        ),
    ],
)
def test_bad_numbers(build: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        build()
    assert str(error.value) == message


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match=r'pip install "vecfl\[privacy\]"'):
        vecfl.privunit2(1.0, 1.0)
    vecfl.local_gaussian(1.0, 1.0, 1e-5)
