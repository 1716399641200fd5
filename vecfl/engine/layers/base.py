"""What all layers of S clients have: whose examples and parameters they see, and when they step."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vecfl.errors import InputError


class StackedLayer(nn.Module):
    """A layer of S clients; its input is one batch, client after client.

    names  of its parameters in the plain layer; at: their positions among the task's parameters,
           None for one that it does not have; rows: those parameters of all clients, [S, *shape]
    lr     of the step that the backward pass takes, None: it gives gradients
    calls  in this pass, of so many examples of all clients
    kind, least  how messages call it, and how many axes its input has at least
    """

    names: tuple[str, ...] = ("weight", "bias")
    kind, least = "a layer", 1

    def __init__(self, layer: Any, at: Mapping[str, int]) -> None:
        super().__init__()
        for name in getattr(layer, "__constants__", ()):  # sizes that a module around it may read
            setattr(self, name, getattr(layer, name))
        self.plain = type(layer).__name__
        self.at = [at.get(name) for name in self.names]
        self.rows: list[Tensor] = []
        self.lr: float | None = None
        self.examples = self.calls = 0

    def __getattr__(self, name: str) -> Any:
        """What a module around it must not read, for it is not there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            plain = self.__dict__.get("plain", "plain")
            raise AttributeError(
                f"its forward reads '{name}' of a {plain} layer itself, outside of the "
                "layer's own: use vmap or loop"
            ) from None

    @staticmethod
    def takes(layer: Any) -> bool:
        """Whether it computes what this plain layer does."""
        return True

    def begin(self, rows: list[Tensor], examples: int, lr: float | None) -> None:
        """Start a pass over so many examples of all slots; `rows` are all parameters."""
        self.rows, self.examples, self.lr, self.calls = rows, examples, lr, 0

    def begin_call(self, x: Tensor, axis: int = 0) -> list[Tensor | None]:
        """Its parameters, for an input whose `axis` is the batch; InputError if it is not."""
        self.calls += 1
        if x.dim() < max(self.least, axis + 1) or x.shape[axis] % self.examples:
            raise InputError(
                f"{self.kind} gets {list(x.shape)} for a batch of {self.examples}: a module "
                "that cuts or reorders the batch has no stacked form"
            )
        return [None if i is None else self.rows[i] for i in self.at]
