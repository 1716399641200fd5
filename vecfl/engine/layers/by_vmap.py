"""A module of S clients by `torch.func.vmap`, inside ordinary autograd."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from vecfl.engine.layers.base import StackedLayer
from vecfl.errors import InputError
from vecfl.modules import Draws


class ByVmap(StackedLayer):
    """Any module of S clients, from [S * B, ...] to [S * B, ...].

    batched  of each call in a pass, which of its arguments are examples. The first pass decides, by
             their lengths; later ones may have as many examples as another argument is long.
    """

    def __init__(self, layer: nn.Module, at: Mapping[str, int], draws: Draws) -> None:
        self.names = tuple(at)
        super().__init__(layer, at)
        self.inner, self.draws = layer, draws
        self.batched: list[list[bool]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found, form = tree_flatten((args, kwargs))
        if self.calls == len(self.batched):
            self.batched.append([self.examples_in(a) for a in found])
        batched = self.batched[self.calls]
        self.calls += 1
        if not any(batched) or not all(
            self.examples_in(a) for a, b in zip(found, batched, strict=True) if b
        ):
            shapes = [list(a.shape) for a in found if isinstance(a, Tensor)]
            raise InputError(
                f"a module by vmap gets {shapes} for a batch of {self.examples}: a module that "
                "cuts or reorders the batch has no stacked form"
            )
        before = self.draws.streams, self.draws.examples
        try:
            self.draws.examples = None
            return self.run(found, form, batched)
        finally:
            self.draws.streams, self.draws.examples = before

    def run(self, found: list[Any], form: TreeSpec, batched: list[bool]) -> Any:
        """What the module makes of arguments, of which some are `batched`."""
        given_back: list[Any] = []

        def one(rows: list[Tensor], streams: Tensor | None, given: list[Any]) -> list[Tensor]:
            self.draws.streams = streams
            args, kwargs = tree_unflatten(given, form)
            params = dict(zip(self.names, rows, strict=True))
            given_back[:] = tree_flatten(functional_call(self.inner, params, args, kwargs))
            return [t for t in given_back[0] if isinstance(t, Tensor)]

        clients, streams = len(self.rows[0]), self.draws.streams
        own = [self.rows[i] for i in self.at if i is not None]
        pairs = list(zip(found, batched, strict=True))
        given = [a.unflatten(0, (clients, -1)) if b else a for a, b in pairs]
        dims = [0] * len(own), None if streams is None else 0, [0 if b else None for b in batched]
        tensors = iter(vmap(one, dims, randomness="error")(own, streams, given))
        out, form = given_back
        joined = [self.joined(next(tensors)) if isinstance(t, Tensor) else t for t in out]
        return tree_unflatten(joined, form)

    def examples_in(self, a: Any) -> bool:
        """Whether an argument has one row, or more, for each example."""
        return isinstance(a, Tensor) and a.dim() > 0 and len(a) % self.examples == 0

    def joined(self, out: Tensor) -> Tensor:
        """[S, B, ...] as [S * B, ...]."""
        if out.dim() < 2 or not self.examples_in(out.flatten(0, 1)):
            raise InputError(
                f"a module by vmap gives {list(out.shape[1:])} for each client: no row for each "
                "example"
            )
        return out.flatten(0, 1)
