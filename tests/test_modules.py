"""Keyed dropout against the oracle's masks, and what happens to modules before they train."""

import copy
import math
from contextlib import suppress

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


@pytest.mark.parametrize("p", [1 / 256, 0.25, 0.5, 255 / 256, 0.1, 0.3, 0.001, 0.9999])
def test_masks_are_those_of_the_oracle(p: float) -> None:
    shape = (3, 5, 7)  # 105 elements fill no whole word of 4 or 2 lanes
    expected = philox.dropout_mask(SEED, 5, 9, 3, 2, p, shape)
    assert torch.equal(factors(p, shape, layer=2), torch.from_numpy(expected))


def test_lanes_and_thresholds() -> None:
    """q = round((1 - p) 2^bits): 0.75 * 256 = 192, 0.9 * 65536 = 58982.4, 0.7 * 65536 = 45875.2."""
    assert [lanes(p) for p in (0.25, 0.5)] == [(8, 192), (8, 128)]
    assert [lanes(p) for p in (0.1, 0.3)] == [(16, 58982), (16, 45875)]


@pytest.mark.parametrize("p", [0.25, 0.5, 0.1, 0.3])
def test_keep_rate_and_mean(p: float) -> None:
    """Kept of n are binomial(n, 1 - p): six standard deviations are a false alarm in 5e8.

    The threshold is off from (1 - p) by at most 2^-17, 0.02 deviations here.
    """
    n = 1 << 18
    result = factors(p, (n,))
    deviation = math.sqrt(n * p * (1 - p))
    assert abs(int((result > 0).sum()) - n * (1 - p)) < 6 * deviation
    assert result.mean().item() == pytest.approx(1, abs=6 * deviation / n / (1 - p))
    bits, q = lanes(p)
    assert set(result.tolist()) == {0, 2**bits / q}


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
    mask = draw_mask(streams, SEED, 1, (5, 3), 0.3)
    assert mask.shape == (2, 3, 5, 3) and mask.dtype == torch.bool
    expected = philox.dropout_mask(SEED, 0, 4, 0, 1, 0.3, (5, 3)) > 0
    assert torch.equal(mask[1, 1], torch.from_numpy(expected))


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
