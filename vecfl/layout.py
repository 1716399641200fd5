"""Where each parameter sits in a row of length P, and views of a [S, P] buffer."""

import copy
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from vecfl.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One tensor of the model inside a row: its elements are row[offset : offset + size]."""

    name: str
    shape: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """The view [..., *shape] of flat [..., P]."""
        part = flat[..., self.offset : self.offset + self.size]
        return part.view((*flat.shape[:-1], *self.shape))


@dataclass(frozen=True)
class Layout:
    """A row of P numbers: the trainable parameters, then the buffers that training changes.

    Tied parameters appear once, under their first name; frozen parameters and constant buffers do
    not appear: they are `constants`, by name. Of a message it has `parts` such rows.
    """

    params: tuple[Entry, ...]
    buffers: tuple[Entry, ...] = ()
    constants: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    parts: int = 1

    @classmethod
    def of(cls, module: nn.Module, changing: Iterable[str] = ()) -> "Layout":
        """The layout of `module`; `changing` names the buffers that a training step changes."""
        changing, offset = set(changing), 0
        params, buffers, constants = [], [], {}
        for name, p in module.named_parameters():
            if p.requires_grad:
                params.append(Entry(name, tuple(p.shape), offset, p.dtype))
                offset += p.numel()
            else:
                constants[name] = p.detach()
        for name, b in module.named_buffers():
            if name in changing:
                buffers.append(Entry(name, tuple(b.shape), offset, b.dtype))
                offset += b.numel()
            else:
                constants[name] = b
        return cls(tuple(params), tuple(buffers), constants)

    @cached_property
    def frozen(self) -> str:
        """A fingerprint of the constants, in their order; "nothing" where there are none."""
        digest = hashlib.blake2b(digest_size=8)
        for value in self.constants.values():
            flat = value.cpu().contiguous().reshape(-1)
            digest.update(f"{value.dtype} {list(value.shape)};".encode())
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest() if self.constants else "nothing"

    @property
    def trainable(self) -> int:
        """The length of a row's first part, the trainable parameters."""
        return sum(e.size for e in self.params)

    @property
    def size(self) -> int:
        """P, the length of a row."""
        return self.trainable + sum(e.size for e in self.buffers)

    def of_message(self, messages: tuple[str, ...]) -> "Layout":
        """The layout of rows side by side, each of this one: a message of several parts.

        The first part's tensors keep their names; those of another are `part/name`, and stand
        behind the first part's buffers.
        """
        more = tuple(
            replace(e, name=f"{part}/{e.name}", offset=e.offset + i * self.size)
            for i, part in enumerate(messages)
            for e in self.params + self.buffers
            if i
        )
        return replace(self, buffers=self.buffers + more, parts=len(messages)) if more else self

    def rows(self, length: int) -> list[slice]:
        """The rows of P, one or several, in a message of `length` numbers."""
        width = self.size // self.parts
        return [slice(at, at + width) for at in range(0, length, width)]

    def spans(self, length: int) -> list[slice]:
        """Where each tensor lies in a message of `length` numbers: one row of P, or several.

        InputError for a length that is no multiple of P.
        """
        if length % self.size:
            raise InputError(f"a message of {length} numbers: expected a multiple of {self.size}")
        entries = [e for e in self.params + self.buffers if e.size]
        starts = [row + e.offset for row in range(0, length, self.size) for e in entries]
        sizes = [e.size for e in entries] * (length // self.size)
        return [slice(at, at + size) for at, size in zip(starts, sizes, strict=True)]

    def param_views(self, flat: Tensor) -> list[Tensor]:
        """Views [..., *shape] of flat [..., P] (or [..., trainable]), one for each parameter."""
        return [e.of(flat) for e in self.params]

    def buffer_views(self, flat: Tensor) -> list[Tensor]:
        """Views [..., *shape] of flat [..., P], one for each changing buffer, in its dtype."""
        return [e.of(flat) for e in self.buffers]

    def flatten(self, module: nn.Module) -> Tensor:
        """The row [P] of `module`, a copy, in the dtype of its first trainable parameter."""
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        dtype = tensors[self.params[0].name].dtype
        parts = [tensors[e.name].detach().reshape(-1).to(dtype) for e in self.params + self.buffers]
        return torch.cat(parts)

    def unflatten(self, row: Tensor) -> dict[str, Tensor]:
        """The named tensors of row [P]; integer buffers are rounded to their own dtype."""
        tensors = dict(zip((e.name for e in self.params), self.param_views(row), strict=True))
        for e in self.buffers:
            tensors[e.name] = restore(e, e.of(row))
        return tensors

    def state_dict(self, module: nn.Module, row: Tensor) -> dict[str, Tensor]:
        """The state dict that `module` would have with the numbers of `row` [P]."""
        module = copy.deepcopy(module)
        for name, value in self.unflatten(row).items():
            parent, _, leaf = name.rpartition(".")
            getattr(module.get_submodule(parent), leaf).data.copy_(value)
        return {name: t.detach().clone() for name, t in module.state_dict().items()}

    def trained(self, module: nn.Module, row: Tensor) -> dict[str, Tensor]:
        """What row [P] has of the state dict of `module`, tied tensors under all their names."""
        named = [*module.named_parameters(), *module.named_buffers()]
        first, found = {id(t): name for name, t in named}, self.unflatten(row)
        names = {name: first.get(id(t)) for name, t in module.state_dict(keep_vars=True).items()}
        return {name: found[own] for name, own in names.items() if own in found}

    def round_integers_(self, row: Tensor) -> None:
        """Round the integer buffers of row [P], which may hold means."""
        for e in self.buffers:
            if not e.dtype.is_floating_point:
                e.of(row).round_()


def restore(entry: Entry, value: Tensor) -> Tensor:
    """A buffer's value from its row, in the dtype that the module expects."""
    if entry.dtype.is_floating_point:
        return value
    return value.round().to(entry.dtype)


def freeze(module: nn.Module, pattern: str) -> list[str]:
    """Freeze, in place, the parameters with a name in which `pattern` is found (`re.search`).

    They get requires_grad=False: a `Task` made of the module neither trains, stacks nor sends them,
    and its state dicts keep their values. Returns their names; a tied parameter has several, of
    which one is enough. Raises InputError, and changes nothing, for a pattern that is no regular
    expression, finds nothing, or leaves nothing to train.
    """
    try:
        found = re.compile(pattern).search
    except re.error as error:
        raise InputError(f"freeze({pattern!r}): no regular expression: {error}") from error
    named = list(module.named_parameters(remove_duplicate=False))
    chosen = {name: p for name, p in named if found(name)}
    if not chosen:
        names = ", ".join(name for name, _ in named)
        raise InputError(f"freeze({pattern!r}): no parameter is called so; there are {names}")
    frozen = {id(p) for p in chosen.values()}
    if not any(p.requires_grad and id(p) not in frozen for _, p in named):
        raise InputError(f"freeze({pattern!r}): nothing would remain to train")
    for p in chosen.values():
        p.requires_grad_(False)
    return list(chosen)
