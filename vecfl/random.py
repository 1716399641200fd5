"""Randomness as a function: every draw is Philox of (seed; what, round, client, ...).

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A counter
of four 32-bit words goes in, four 32-bit words come out. The packing of the counter is the contract
of `docs/design.md`, section "Draws".
"""

from enum import IntEnum

import torch
from torch import Tensor

import vecfl_kernels
from vecfl.errors import InputError, is_integer
from vecfl_kernels import philox

AT_A_TIME = 1 << 14  # blocks of four words
LIMITS = {"client": 32, "round": 22, "occurrence": 10, "kind": 4, "layer": 8, "step": 20}
Int = int | Tensor


class Kind(IntEnum):
    """What a stream of draws is for; no two kinds share a counter."""

    COHORT = 0
    SUBSET = 1
    SHUFFLE = 2
    DROPOUT = 3
    AUGMENT = 4
    CODEC = 6
    NOISE = 7
    STATISTICS = 8


def check_seed(name: str, seed: int) -> int:
    """`seed` itself; InputError naming the argument `name` if it is no integer in [0, 2^63)."""
    if not is_integer(seed) or not 0 <= seed < 2**63:
        raise InputError(f"{name} must be an integer in [0, 2^63), not {seed!r}")
    return int(seed)


def stream(
    kind: Kind,
    *,
    client: Int = 0,
    round: Int = 0,
    occurrence: Int = 0,
    layer: Int = 0,
    step: Int = 0,
) -> Tensor:
    """Counter words 1-3 of a stream, [..., 3] int64; integers and int64 tensors broadcast.

    Raises InputError if a value does not fit its field (see `LIMITS`): two streams would share
    counters.
    """
    fields = {
        "client": client,
        "round": round,
        "occurrence": occurrence,
        "layer": layer,
        "step": step,
    }
    for name, value in fields.items():
        largest = value if isinstance(value, int) else int(value.max()) if value.numel() else 0
        smallest = value if isinstance(value, int) else int(value.min()) if value.numel() else 0
        if smallest < 0 or largest >> LIMITS[name]:
            raise InputError(
                f"{name} {smallest if smallest < 0 else largest} has no random stream of its own: "
                f"the counter holds 0 to 2^{LIMITS[name]} - 1"
            )
    words = (client, (round << 10) | occurrence, (int(kind) << 28) | (layer << 20) | step)
    return torch.stack(torch.broadcast_tensors(*(torch.as_tensor(w) for w in words)), -1)


def with_layer(streams: Tensor, layer: int) -> Tensor:
    """`streams` [..., 3] (made with layer 0) moved to `layer`."""
    return torch.stack((streams[..., 0], streams[..., 1], streams[..., 2] | (layer << 20)), -1)


def with_kind(streams: Tensor, kind: Kind) -> Tensor:
    """`streams` [..., 3] moved to `kind`; client, round, occurrence, layer and step stay."""
    place = streams[..., 2] & ((1 << 28) - 1)
    return torch.stack((streams[..., 0], streams[..., 1], (int(kind) << 28) | place), -1)


def blocks(seed: int, streams: Tensor, block: Tensor) -> Tensor:
    """The words [..., 4] of each `block`: streams [..., 3] and block [...] broadcast."""
    first, *rest = torch.broadcast_tensors(block, *streams.unbind(-1))
    return philox(torch.stack((first, *rest), -1), seed)


def words(seed: int, streams: Tensor, n: int) -> Tensor:
    """Words 0..n-1 of each stream: streams [..., 3] to int64 [..., n] in [0, 2^32)."""
    block, streams = torch.arange(-(-n // 4), device=streams.device), streams.unsqueeze(-2)
    some = max(1, AT_A_TIME // max(1, streams[..., 0].numel()))  # a CPU caches them
    parts = [blocks(seed, streams, part).flatten(-2) for part in block.split(some)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1))[..., :n]


def ragged_words(seed: int, streams: Tensor, sizes: Tensor) -> Tensor:
    """Words 0..sizes[i]-1 of stream i, one after the other.

    streams [I, 3] and sizes [I] give int64 [sum(sizes)].
    """
    count = (sizes + 3) // 4
    owner = torch.repeat_interleave(torch.arange(len(sizes)), count)
    block = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
    element = 4 * block[:, None] + torch.arange(4)
    return blocks(seed, streams[owner], block)[element < sizes[owner, None]]


def uniform(seed: int, streams: Tensor, n: int) -> Tensor:
    """n draws from (0, 1) per stream, float64 [..., n]: (word + 1/2) / 2^32."""
    return vecfl_kernels.uniforms(words(seed, streams, n))


def normal(seed: int, streams: Tensor, n: int) -> Tensor:
    """n standard normals per stream, float64 [..., n]: Box-Muller on words (0, 1), (2, 3), ..."""
    return vecfl_kernels.normals(words(seed, streams, n + n % 2))[..., :n]


def laplace(seed: int, streams: Tensor, n: int) -> Tensor:
    """n Laplace numbers of scale 1 per stream, float64 [..., n]: -sign(x) log(1 - 2 |x|)."""
    x = uniform(seed, streams, n) - 0.5
    return -x.sign() * torch.log1p(-2 * x.abs())


def permutation(seed: int, streams: Tensor, n: int) -> Tensor:
    """A uniform permutation of 0..n-1 per stream, int64 [..., n]: the stable argsort of n words."""
    return words(seed, streams, n).argsort(dim=-1, stable=True)


def ragged_permutation(seed: int, streams: Tensor, sizes: Tensor) -> Tensor:
    """`permutation` of sizes[i] elements for stream i, one after the other; one sort for all.

    streams [I, 3] and sizes [I] give int64 [sum(sizes)].
    """
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    key = (owner << 32) | ragged_words(seed, streams, sizes)
    return key.argsort(stable=True) - (sizes.cumsum(0) - sizes)[owner]
