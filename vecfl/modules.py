"""What a module must be before clients train it side by side: keyed dropout, no batch statistics.

Dropout draws from Philox, keyed by client, round, step and layer, so that a mask is the same in
every backend and slot. Modules whose result depends on the other examples of a batch are refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecfl.errors import InputError
from vecfl.random import LIMITS, with_layer, words

CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROPOUTS = (nn.Dropout, *CHANNELWISE)  # not their subclasses, whose forward may be another
AHEAD = 1 << 20  # elements of masks that a layer draws at a time, of a loop's next steps


class Draws:
    """The streams of a model's forward passes, shared by all its keyed modules."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.calls = seed, 0
        self.examples: int | None = None  # of all clients, in a pass that is over several
        self.streams: Tensor | None = None
        self.step: int | None = None
        self.alone: tuple[Tensor, int] | None = None
        self.ahead: dict[tuple[int, float, torch.dtype], tuple[int, tuple[Tensor, ...]]] = {}

    def begin(self, streams: Tensor) -> None:
        """Start a forward pass with counter words `streams` [3]; under vmap they may be batched.
        With streams [S, 3] the pass is over the examples of S clients, one after the other."""
        self.streams, self.step, self.calls = streams, None, 0

    def begin_all(self, streams: Tensor) -> None:
        """Take on L passes, `streams` [L, 3]; `next_step` starts each. Masks are drawn ahead."""
        self.streams, self.step = streams, -1
        self.ahead.clear()

    def next_step(self) -> None:
        assert self.step is not None
        self.step, self.calls = self.step + 1, 0

    def only(self, place: Tensor, batch: int) -> None:
        """Start a pass over one example, which has the masks of its `place` [1] in the batch."""
        self.alone, self.calls = (place, batch), 0

    def next_layer(self) -> int:
        """The ordinal of this call in the forward pass, from 0."""
        self.calls += 1
        if self.calls > 1 << LIMITS["layer"]:
            raise InputError(f"more than {1 << LIMITS['layer']} dropout calls in one forward pass")
        return self.calls - 1

    def mask(self, n: int, p: float, dtype: torch.dtype) -> Tensor:
        """What the next dropout call multiplies its n elements by, [n]."""
        if self.alone is None:
            return self._masks(n, p, dtype)
        place, batch = self.alone
        masks = self._masks(batch * n, p, dtype).view(batch, n)
        return masks.index_select(0, place)[0]

    def _masks(self, n: int, p: float, dtype: torch.dtype) -> Tensor:
        layer = self.next_layer()
        if self.step is None:
            assert self.streams is not None
            each = n // self.streams.shape[:-1].numel()
            return KeyedMask.apply(self.streams, self.seed, layer, each, p, dtype).flatten()
        first, masks = self.ahead.get((layer, p, dtype), (self.step, ()))
        if not first <= self.step < first + len(masks) or n > len(masks[0]):
            assert self.streams is not None
            first, most = self.step, max(n, len(masks[0]) if masks else 1)
            streams = self.streams[first : first + max(1, AHEAD // most)]
            masks = draw_mask(streams, self.seed, layer, most, p, dtype).unbind()
            self.ahead[layer, p, dtype] = first, masks
        return masks[self.step - first][:n]


@cache
def lanes(p: float) -> tuple[int, int]:
    """(bits of a draw, q): an element is kept when its draw is below q (docs/design.md, Draws)."""
    bits = next((b for b in (1, 2, 4, 8) if p * (1 << b) % 1 == 0), 16)
    return bits, round((1 - p) * (1 << bits))


@cache
def factors(p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The lanes of every byte as factors, [256, 8 / bits]; [65536, 1] for 16-bit lanes."""
    bits, keep = lanes(p)
    unit = max(bits, 8)
    numbers = torch.arange(1 << unit, device=device).unsqueeze(1)
    lane = (numbers >> torch.arange(0, unit, bits, device=device)) & ((1 << bits) - 1)
    return (lane < keep).to(dtype) * ((1 << bits) / keep)


def draw_mask(
    streams: Tensor, seed: int, layer: int, n: int, p: float, dtype: torch.dtype
) -> Tensor:
    """Factors of n elements, [..., n]: 0, or the scale of what is kept; streams [..., 3]."""
    bits, _ = lanes(p)
    raw = words(seed, with_layer(streams, layer), -(-n * bits // 32)).to(torch.int32)
    numbers = raw.view(torch.uint16 if bits == 16 else torch.uint8).int()
    return F.embedding(numbers, factors(p, dtype, raw.device)).flatten(-2)[..., :n]


class KeyedMask(torch.autograd.Function):
    """`draw_mask` that sees the plain key tensor under vmap, so that one definition serves all."""

    @staticmethod
    def forward(streams: Tensor, *rest: Any) -> Tensor:
        return draw_mask(streams, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, streams: Tensor, *rest: Any) -> tuple[Tensor, int]:
        return draw_mask(streams.movedim(in_dims[0], 0), *rest), 0


class KeyedDropout(nn.Module):
    """Dropout (Srivastava et al., JMLR 2014) with masks from `Draws`; one draw an element.

    With `channelwise`, one draw for each channel of an example (Tompson et al., CVPR 2015).
    """

    def __init__(self, p: float, draws: Draws, channelwise: bool = False) -> None:
        super().__init__()
        self.p, self.draws, self.channelwise = p, draws, channelwise

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        bits, keep = lanes(self.p)
        if keep in (0, 1 << bits):
            self.draws.next_layer()
            return x if keep else x * 0
        return x * self.mask(x)

    def mask(self, x: Tensor) -> Tensor:
        """What x [B, ...] is multiplied by, [B, ...] or [B, channels, 1, ...]."""
        if self.draws.examples is not None and len(x) % self.draws.examples:
            raise InputError(
                f"a dropout layer gets {list(x.shape)} for a batch of {self.draws.examples}: a "
                "module that cuts or reorders the batch has no stacked form"
            )
        shape = x.shape[:2] if self.channelwise else x.shape
        mask = self.draws.mask(shape.numel(), self.p, x.dtype)
        return mask.view(*shape, *(1,) * (x.dim() - len(shape)))

    def extra_repr(self) -> str:
        return f"p={self.p}, channelwise={self.channelwise}"


def called(path: str) -> str:
    """How messages call the submodule at `path`."""
    return f"module '{path}'" if path else "the module"


def replace(module: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` at `path` ("layers.2") inside `module`."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)


def keyed_dropout(module: Any, draws: Draws) -> KeyedDropout:
    """The keyed counterpart of a dropout layer."""
    return KeyedDropout(module.p, draws, type(module) in CHANNELWISE)


def key_dropouts(module: nn.Module, draws: Draws) -> nn.Module:
    """`module` with its dropout layers replaced, in place, by `KeyedDropout` on `draws`."""
    if type(module) in DROPOUTS:
        return keyed_dropout(module, draws)
    keyed: dict[nn.Module, nn.Module] = {}
    for path, m in list(module.named_modules(remove_duplicate=False)):
        if type(m) in DROPOUTS:
            if m not in keyed:
                keyed[m] = keyed_dropout(m, draws)
            replace(module, path, keyed[m])
    return module


def batchnorm_to_groupnorm(module: nn.Module, groups: int = 2) -> nn.Module:
    """`module` with every BatchNorm replaced, in place, by a fresh GroupNorm of the same channels.

    GroupNorm (Wu and He, ECCV 2018) needs no statistics over clients; Hsieh et al., "The non-IID
    data quagmire", ICML 2020, recommend it for federated learning. InputError where `groups` does
    not divide the channels.
    """
    made: dict[nn.Module, nn.Module] = {}
    for path, m in list(module.named_modules(remove_duplicate=False)):
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.num_features % groups:
                raise InputError(
                    f"{groups} groups do not divide the {m.num_features} channels of {called(path)}"
                )
            if m not in made:
                new = nn.GroupNorm(groups, m.num_features, eps=m.eps, affine=m.affine)
                made[m] = new.to(m.weight) if m.affine else new
            if not path:
                return made[m]
            replace(module, path, made[m])
    return module


def refuse_batchnorm(module: nn.Module) -> None:
    """InputError naming the first BatchNorm of `module`."""
    for path, m in module.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"{called(path)} ({type(m).__name__}) uses statistics of the batch, which padded "
                "examples would enter; use vecfl.batchnorm_to_groupnorm(module) or another norm"
            )


@contextmanager
def blame(module: nn.Module) -> Iterator[list[str]]:
    """Watch forward passes of `module`.

    The list that is yielded names the submodule that was running when an exception left it, and,
    behind it, the one that drew from torch's random generator.
    """
    running, states, found = [], [], [""]
    names = {m: called(path) for path, m in module.named_modules()}

    def enter(m: nn.Module, _: object) -> None:
        running.append(m)
        states.append(torch.get_rng_state())
        found[0] = names[m]

    def leave(m: nn.Module, *_: object) -> None:
        running.pop()
        if not torch.equal(states.pop(), torch.get_rng_state()):
            found.append(names[m])
        found[0] = names[running[-1]] if running else ""

    hooks = [m.register_forward_pre_hook(enter) for m in names]
    hooks += [m.register_forward_hook(leave) for m in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
