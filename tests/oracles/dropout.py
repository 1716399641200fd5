"""Dropout layers whose masks are the draws of docs/design.md."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import philox

CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass
class Place:
    """Where a client is in its round, for the dropout layers of its model."""

    seed: int
    t: int
    client: int
    occurrence: int = 0
    step: int = -1
    layer: int = 0
    example: int | None = None  # the only one of its batch that the model sees

    def next_batch(self) -> None:
        self.step, self.layer = self.step + 1, 0

    def only(self, example: int) -> None:
        self.example, self.layer = example, 0


class Dropout(nn.Module):
    """Stands in for a dropout layer of torch; `channels` drops whole channels.

    training  whether that one drops: a module may keep it off
    """

    def __init__(self, p: float, channels: bool, place: Place, training: bool) -> None:
        super().__init__()
        self.p, self.channels, self.place, self.training = p, channels, place, training

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        at = self.place
        shape = tuple(x.shape[:2] if self.channels else x.shape)
        if at.example is not None:
            shape = (at.example + 1, *shape[1:])
        key = (at.seed, at.t, at.client, at.step, at.layer)
        mask = philox.dropout_mask(*key, self.p, shape, at.occurrence)
        at.layer += 1
        if at.example is not None:
            mask, shape = mask[at.example :], (1, *shape[1:])
        return x * torch.from_numpy(mask).to(x).reshape(shape + (1,) * (x.dim() - len(shape)))


def replace_dropout(model: nn.Module, place: Place) -> None:
    """Puts a Dropout that counts at `place` where the model has one of torch."""
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, (nn.Dropout, *CHANNELS)):
            channels = isinstance(layer, CHANNELS)
            model.set_submodule(name, Dropout(layer.p, channels, place, layer.training))
