"""Memory that a layer writes into at every step, so that none is asked for twice."""

from torch import Tensor


class Memory:
    """Tensors by name; what a step left in one, the next step overwrites."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The tensor `name` of a shape, of the kind of `like`; its values are what was left.

        A shorter one is the beginning of the one before.
        """
        kept = self.kept.get(name)
        if kept is not None and kept.shape == shape:
            return kept
        if kept is None or kept.shape[1:] != shape[1:] or len(kept) < shape[0]:
            kept = self.kept[name] = like.new_empty(shape)
        return kept[: shape[0]]

    def like(self, name: str, x: Tensor) -> Tensor:
        """The tensor `name` of the shape of x."""
        return self.empty(name, x.shape, x)
