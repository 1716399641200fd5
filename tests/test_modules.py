"""Keyed dropout against the oracle's masks, and what happens to modules before they train."""

import copy
import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from vecfl.errors import InputError
from vecfl.modules import (
    Draws,
    KeyedDropout,
    batchnorm_to_groupnorm,
    blame,
    draw_mask,
    key_dropouts,
    lanes,
    refuse_batchnorm,
)
from vecfl.random import Kind, stream

from .oracles import philox

SEED = 2**40 + 3
PLACE = {"client": 9, "round": 5, "step": 3}


def factors(
    p: float, shape: tuple[int, ...], layer: int = 0, seed: int = SEED, **place: int
) -> Tensor:
    """What a dropout layer multiplies an activation by, as call number `layer` of the forward."""
    draws = Draws(seed)
    draws.begin(stream(Kind.DROPOUT, **(PLACE | place)))
    drop = KeyedDropout(p, draws)
    for _ in range(layer):
        drop(torch.ones(1))
    return drop(torch.ones(shape, dtype=torch.float64))


# ------------------------------------------------------------------ masks


# Two words, the first with bytes e4 1b c6 93 from its low end. By hand: draws, q of 2^bits, kept.
WORDS = (0x93C61BE4, 0x0000FFFF)
BY_HAND = {
    # Bits of e4 = 1110 0100 from the right: 0 0 1 0 0 1 1 1, and so on; kept where 0 (q = 1 of 2).
    1 / 2: (1, 1, "11011000 00100111 10011100 00110110 00000000 00000000 11111111 11111111"),
    # e4 = 3 2 1 0 from the right: 0 1 2 3; 1b: 3 2 1 0; c6: 2 1 0 3; 93: 3 0 1 2 (q = 3 of 4).
    1 / 4: (2, 3, "1110 0111 1110 0111 0000 0000 1111 1111"),
    # 4 e b 1 6 c 3 9 and f f f f 0 0 0 0; q = 11 of 16, and b = 11 is not below it.
    5 / 16: (4, 11, "10 01 10 11 00 00 11 11"),
    # e4 = 228, 1b = 27, c6 = 198, 93 = 147; q = 147 of 256, and 147 is not below it.
    109 / 256: (8, 147, "0 1 0 0 0 0 1 1"),
    # 1be4 = 7140, 93c6 = 37830, ffff, 0; q = round(0.55 * 65536 = 36044.8) = 36045.
    0.45: (16, 36045, "10 01"),
}


@pytest.mark.parametrize("p", BY_HAND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_of_two_words_by_hand(
    p: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits, q, kept = BY_HAND[p]
    planted = torch.tensor([*WORDS, 0, 0])
    monkeypatch.setattr("vecfl.random.philox", lambda counter, seed: planted.expand_as(counter))
    n = 64 // bits
    mask = draw_mask(stream(Kind.DROPOUT), SEED, 0, n, p, dtype)
    assert mask.shape == (n,) and mask.dtype == dtype
    expected = [2**bits / q * int(digit) for digit in kept.replace(" ", "")]
    assert torch.equal(mask, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("p", [1 / 256, 0.25, 0.5, 0.75, 5 / 16, 255 / 256, 0.1, 0.3, 1e-3, 0.9999])
def test_masks_are_those_of_the_oracle(p: float) -> None:
    shape = (3, 5, 7)  # 105 elements fill no whole word of any kind of lanes
    expected = philox.dropout_mask(SEED, 5, 9, 3, 2, p, shape)
    assert torch.equal(factors(p, shape, layer=2), torch.from_numpy(expected))


def test_lanes_and_thresholds() -> None:
    """q = round((1 - p) 2^bits): 0.9 * 65536 = 58982.4, 0.7 * 65536 = 45875.2."""
    assert [lanes(p) for p in (0.5, 0.25, 0.75)] == [(1, 1), (2, 3), (2, 1)]
    assert [lanes(p) for p in (1 / 16, 1 / 8, 1 / 32)] == [(4, 15), (4, 14), (8, 248)]
    assert [lanes(p) for p in (0.1, 0.3, 1 / 512)] == [(16, 58982), (16, 45875), (16, 65408)]


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.75, 1 / 16, 1 / 32])
def test_keep_rate_and_mean(p: float) -> None:
    """Kept of n are binomial(n, 1 - p): four standard deviations are a false alarm in 16,000.

    The threshold is off from (1 - p) by at most 2^-17, 0.02 deviations here.
    """
    n = 1 << 18
    result = factors(p, (n,))
    deviation = math.sqrt(n * p * (1 - p))
    assert abs(int((result > 0).sum()) - n * (1 - p)) < 4 * deviation
    assert result.mean().item() == pytest.approx(1, abs=4 * deviation / n / (1 - p))
    bits, q = lanes(p)
    assert set(result.tolist()) == {0, 2**bits / q}


@pytest.mark.parametrize("p", [0.5, 0.25, 1 / 16, 1 / 32, 0.1])
@pytest.mark.parametrize("apart", [1, 4, 8, 16, 32, 1000])
def test_elements_of_a_mask_are_independent(p: float, apart: int) -> None:
    """Neighbours, lanes of a byte, of a word, and rows: with z of mean 0 and variance 1, products
    of independent neighbours have mean 0 and variance 1; six deviations are a false alarm in 5e8.
    """
    bits, q = lanes(p)
    keep = q / 2**bits
    z = ((factors(p, (256, 1000)) > 0).double().flatten() - keep) / math.sqrt(keep * (1 - keep))
    product = z[apart:] * z[:-apart]
    assert abs(product.sum().item()) < 6 * math.sqrt(len(product))


@pytest.mark.parametrize("other", ["client", "round", "step", "layer", "seed"])
def test_masks_of_two_streams_are_independent(other: str) -> None:
    """1024 elements at p = 1/2 agree in 512 +- 16: six deviations are a false alarm in 5e8."""
    here = factors(0.5, (1024,), layer=1)
    changed = {"layer": 1} | {other: 2}
    there = factors(0.5, (1024,), **changed)
    assert abs(int((here == there).sum()) - 512) < 6 * 16
    assert torch.equal(here, factors(0.5, (1024,), layer=1))


@pytest.mark.parametrize("p", [0.25, 0.3])
@pytest.mark.parametrize("valid", [1, 3, 4])
def test_a_trimmed_batch_has_the_mask_of_the_padded_one(p: float, valid: int) -> None:
    assert torch.equal(factors(p, (5, 7))[:valid], factors(p, (valid, 7)))


@pytest.mark.parametrize("p", [0.25, 0.3])
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_gives_the_bits_of_plain_calls(p: float, dim: int) -> None:
    streams = stream(Kind.DROPOUT, client=torch.tensor([4, 9, 2**32 - 1]), round=5, step=3)
    draws = Draws(SEED)
    drop = KeyedDropout(p, draws)
    x = torch.linspace(1, 2, 3 * 4 * 5).view(3, 4, 5)

    def run(streams: Tensor, x: Tensor) -> Tensor:
        draws.begin(streams)
        return drop(drop(x))

    plain = torch.stack([run(s, row) for s, row in zip(streams, x, strict=True)])
    assert torch.equal(vmap(run, (dim, 0))(streams.movedim(0, dim), x), plain)
    assert len({tuple(row.tolist()) for row in (plain != 0).flatten(1)}) == 3


def test_gradient_under_vmap_is_the_mask() -> None:
    streams = stream(Kind.DROPOUT, client=torch.tensor([4, 9]), round=5, step=3)
    draws = Draws(SEED)
    drop = KeyedDropout(0.25, draws)

    def total(x: Tensor, streams: Tensor) -> Tensor:
        draws.begin(streams)
        return drop(x).sum()

    slopes = vmap(grad(total))(torch.randn(2, 6, dtype=torch.float64), streams)
    assert torch.equal(slopes[0], factors(0.25, (6,), client=4))
    assert torch.equal(slopes[1], factors(0.25, (6,), client=9))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dropout1d, (4, 6, 3)),
        (nn.Dropout2d, (4, 6, 3, 2)),
        (nn.Dropout3d, (4, 6, 2, 2, 3)),
    ],
)
def test_channel_dropout_drops_whole_channels(layer: type, shape: tuple[int, ...]) -> None:
    draws = Draws(SEED)
    draws.begin(stream(Kind.DROPOUT, **PLACE))
    result = key_dropouts(layer(0.25), draws)(torch.ones(shape, dtype=torch.float64))
    expected = torch.from_numpy(philox.dropout_mask(SEED, 5, 9, 3, 0, 0.25, (4, 6)))
    assert set(expected.flatten().tolist()) == {0, 4 / 3}
    assert torch.equal(result, expected.view(4, 6, *(1,) * (len(shape) - 2)).expand(shape))


def test_draw_mask_of_many_streams_at_once() -> None:
    streams = stream(Kind.DROPOUT, client=torch.arange(6).view(2, 3))
    mask = draw_mask(streams, SEED, 1, 15, 0.3, torch.float64)
    assert mask.shape == (2, 3, 15)
    expected = philox.dropout_mask(SEED, 0, 4, 0, 1, 0.3, (15,))
    assert torch.equal(mask[1, 1], torch.from_numpy(expected))


class Changing(nn.Module):
    """Two dropout layers, of which every third pass calls the other one first."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.passes, self.some = 0, KeyedDropout(0.25, draws)
        self.more = KeyedDropout(0.3, draws)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.some(self.more(x)) if self.passes % 3 == 0 else self.more(self.some(x))


@pytest.mark.parametrize("ahead", [1, 40, 1 << 20])
def test_masks_drawn_ahead_are_those_of_single_passes(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that shrink and grow, layers that change places, a second client, another dtype."""
    monkeypatch.setattr("vecfl.modules.AHEAD", ahead)
    draws = Draws(SEED)
    module = Changing(draws)
    for client, dtype in ((4, torch.float32), (9, torch.float32), (9, torch.float64)):
        streams = stream(Kind.DROPOUT, client=client, round=5, step=torch.arange(8))
        xs = [torch.ones(b, 5, dtype=dtype) for b in (3, 1, 4, 4, 2, 4, 1, 5)]
        module.passes = 0
        draws.begin_all(streams)
        together = []
        for x in xs:
            draws.next_step()
            together.append(module(x))
        module.passes = 0
        for x, one, result in zip(xs, streams, together, strict=True):
            draws.begin(one)
            assert torch.equal(module(x), result) and result.dtype == dtype


def test_steps_are_drawn_ahead_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 elements of room: five steps of 20 elements, then the last two."""
    drawn = []

    def record(streams: Tensor, *rest: Any) -> Tensor:
        drawn.append((len(streams), rest[2]))
        return draw_mask(streams, *rest)

    monkeypatch.setattr("vecfl.modules.AHEAD", 100)
    monkeypatch.setattr("vecfl.modules.draw_mask", record)
    draws = Draws(SEED)
    drop = KeyedDropout(0.5, draws)
    draws.begin_all(stream(Kind.DROPOUT, step=torch.arange(7)))
    for _ in range(7):
        draws.next_step()
        drop(torch.ones(4, 5))
    assert drawn == [(5, 20), (2, 20)]


def test_eval_is_identity_and_takes_no_ordinal() -> None:
    draws = Draws()
    drop = KeyedDropout(0.5, draws).eval()
    x = torch.randn(3, 4)
    assert drop(x) is x and draws.calls == 0


def test_p_of_zero_and_one_keep_their_ordinal() -> None:
    draws = Draws(SEED)
    draws.begin(stream(Kind.DROPOUT, **PLACE))
    x = torch.randn(7, 3, dtype=torch.float64)
    assert torch.equal(KeyedDropout(0.0, draws)(x), x)
    assert torch.equal(KeyedDropout(1.0, draws)(x), torch.zeros_like(x))
    assert torch.equal(KeyedDropout(0.5, draws)(x), x * factors(0.5, (7, 3), layer=2))


@pytest.mark.parametrize(("p", "kept"), [(1e-9, 1), (7e-6, 1), (1 - 7e-6, 0), (1 - 1e-9, 0)])
def test_p_that_rounds_to_zero_or_one_keeps_its_ordinal(p: float, kept: int) -> None:
    """7e-6 * 65536 = 0.46 rounds to 0: all 65536 draws are below the threshold, or none."""
    assert lanes(p) == (16, kept * 65536)
    assert torch.equal(factors(p, (7, 3)), torch.full((7, 3), kept, dtype=torch.float64))
    draws = Draws(SEED)
    draws.begin(stream(Kind.DROPOUT, **PLACE))
    KeyedDropout(p, draws)(torch.ones(1))
    assert draws.calls == 1


def test_more_than_256_calls_are_refused() -> None:
    draws = Draws()
    drop = KeyedDropout(0.5, draws)
    draws.begin(stream(Kind.DROPOUT))
    for _ in range(256):
        drop(torch.ones(1))
    with pytest.raises(InputError, match="more than 256 dropout calls in one forward pass"):
        drop(torch.ones(1))
    draws.begin(stream(Kind.DROPOUT, step=1))  # the next pass counts anew
    assert draws.next_layer() == 0


# ------------------------------------------------------------------ replacing layers


class Twice(nn.Module):
    """One dropout layer under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Dropout(0.5)
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Dropout2d(0.3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_key_dropouts_replaces_in_place_and_keeps_sharing() -> None:
    module, draws = Twice(), Draws(SEED)
    linear = module.inner[0]
    assert key_dropouts(module, draws) is module
    assert isinstance(module.first, KeyedDropout) and module.first is module.second
    assert module.inner[0] is linear and isinstance(module.inner[2], nn.ReLU)
    assert [m.p for m in module.modules() if isinstance(m, KeyedDropout)] == [0.5, 0.3]
    assert [m.channelwise for m in module.modules() if isinstance(m, KeyedDropout)] == [False, True]
    assert all(m.draws is draws for m in module.modules() if isinstance(m, KeyedDropout))
    draws.begin(stream(Kind.DROPOUT, **PLACE))
    x = torch.ones(8, 3, dtype=torch.float64)
    two = factors(0.5, (8, 3), layer=0) * factors(0.5, (8, 3), layer=1)
    assert torch.equal(module(x), two)  # a shared layer draws anew in each call


def test_a_deep_copy_shares_its_draws_within_itself_only() -> None:
    draws = Draws()
    module = key_dropouts(nn.Sequential(nn.Dropout(), nn.Dropout()), draws)
    copied = copy.deepcopy(module)
    assert copied[0].draws is copied[1].draws is not draws


def test_batchnorm_to_groupnorm() -> None:
    norms = [nn.BatchNorm1d(4, eps=0.1), nn.BatchNorm2d(8, affine=False), nn.BatchNorm3d(6)]
    linear = nn.Linear(4, 4)
    module = nn.Sequential(linear, nn.Sequential(*norms), nn.SyncBatchNorm(2), nn.LayerNorm(4))
    assert batchnorm_to_groupnorm(module) is module
    new = [m for m in module.modules() if isinstance(m, nn.GroupNorm)]
    assert [(m.num_groups, m.num_channels) for m in new] == [(2, 4), (2, 8), (2, 6), (2, 2)]
    assert [m.eps for m in new] == [0.1, 1e-5, 1e-5, 1e-5]
    assert new[1].weight is None and torch.equal(new[2].weight, torch.ones(6))
    assert module[0] is linear and isinstance(module[3], nn.LayerNorm)
    refuse_batchnorm(module)


def test_batchnorm_to_groupnorm_of_the_module_itself() -> None:
    new = batchnorm_to_groupnorm(nn.BatchNorm1d(6), groups=3)
    assert isinstance(new, nn.GroupNorm) and (new.num_groups, new.num_channels) == (3, 6)


def test_batchnorm_to_groupnorm_keeps_sharing() -> None:
    norm = nn.BatchNorm1d(4)
    module = batchnorm_to_groupnorm(nn.Sequential(norm, nn.Linear(4, 4), nn.Sequential(norm)))
    assert isinstance(module[0], nn.GroupNorm) and module[2][0] is module[0]
    refuse_batchnorm(module)


def test_batchnorm_to_groupnorm_keeps_the_dtype() -> None:
    module = batchnorm_to_groupnorm(nn.Sequential(nn.BatchNorm1d(4)).double())
    assert module[0].weight.dtype == module[0].bias.dtype == torch.float64
    # Two groups of two channels: (0, 2) has mean 1 and variance 1, (5, 5) has variance 0.
    result = module(torch.tensor([[0.0, 2, 5, 5]], dtype=torch.float64))
    expected = torch.tensor([[-1.0, 1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)  # eps is 1e-5


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3))), "module '1.0'"),
        (nn.BatchNorm1d(3), "the module"),
    ],
)
def test_groups_that_do_not_divide_are_refused(module: nn.Module, name: str) -> None:
    with pytest.raises(InputError) as error:
        batchnorm_to_groupnorm(module)
    assert str(error.value) == f"2 groups do not divide the 3 channels of {name}"


def test_refuse_batchnorm_names_path_and_remedy() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))
    with pytest.raises(InputError) as error:
        refuse_batchnorm(module)
    assert str(error.value).startswith("module '1.1' (BatchNorm1d) uses statistics of the batch")
    assert "vecfl.batchnorm_to_groupnorm(module)" in str(error.value)
    with pytest.raises(InputError, match=r"^the module \(BatchNorm2d\) uses statistics"):
        refuse_batchnorm(nn.BatchNorm2d(3))
    refuse_batchnorm(nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm1d(3)))


def test_blame_names_the_innermost_module_and_leaves_no_hook() -> None:
    module = nn.Sequential(nn.Sequential(nn.Identity(), nn.Dropout(0.5)), nn.Linear(3, 3))
    with torch.random.fork_rng(devices=[]), blame(module) as found:
        with pytest.raises(RuntimeError):
            module(torch.ones(2, 4))
        # failed in 1; drew in 0.1, which is in 0
        assert found == ["module '1'", "module '0.1'", "module '0'"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    with blame(module.eval()) as found:
        module(torch.ones(2, 3))
    assert found == [""]


@pytest.mark.parametrize(
    ("module", "names"), [(nn.Linear(3, 3), ["the module"]), (nn.Dropout(0.5), ["", "the module"])]
)
def test_blame_calls_the_root_the_module(module: nn.Module, names: list[str]) -> None:
    """The linear layer fails on four inputs; dropout draws."""
    with torch.random.fork_rng(devices=[]), blame(module) as found, suppress(RuntimeError):
        module(torch.ones(2, 4))
    assert found == names
