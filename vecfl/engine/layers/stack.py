"""Which layers of a module have a form for S clients, and what is run by vmap instead."""

from collections.abc import Collection, Iterable

from torch import nn

from vecfl.engine.layers.affine import StackedLinear
from vecfl.engine.layers.base import StackedLayer
from vecfl.engine.layers.by_vmap import ByVmap
from vecfl.engine.layers.convolution import StackedConvolution
from vecfl.engine.layers.embedding import StackedEmbedding
from vecfl.engine.layers.norm import StackedNorm
from vecfl.engine.layers.recurrent import StackedRecurrent
from vecfl.errors import InputError
from vecfl.models import GRU, LSTM
from vecfl.modules import Draws, replace

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
FORMS: dict[type[nn.Module], type[StackedLayer]] = {
    nn.Linear: StackedLinear,
    nn.Conv1d: StackedConvolution,
    nn.Conv2d: StackedConvolution,
    nn.Embedding: StackedEmbedding,
    nn.LayerNorm: StackedNorm,
    nn.RMSNorm: StackedNorm,
    nn.GroupNorm: StackedNorm,
    nn.InstanceNorm1d: StackedNorm,
    nn.InstanceNorm2d: StackedNorm,
    nn.InstanceNorm3d: StackedNorm,
    nn.LSTM: StackedRecurrent,
    nn.GRU: StackedRecurrent,
    LSTM: StackedRecurrent,
    GRU: StackedRecurrent,
}


def stack_layers(
    module: nn.Module, names: Iterable[str], draws: Draws, by_vmap: Collection[str] = ()
) -> tuple[nn.Module, list[StackedLayer]]:
    """`module` with what trains replaced, in place, by layers of S clients, and these.

    names  of the parameters that train, in their order; by_vmap: paths of modules that have no
    other form, for a reason that does not show in the module tree

    Raises InputError where that is the whole module, or what no form computes.
    """
    at = {id(module.get_parameter(name)): i for i, name in enumerate(names)}
    whole = without_form(module, set(at), by_vmap)
    if "" in whole:
        raise InputError(f"the module ({type(module).__name__}) has no stacked form{whole['']}")
    made: dict[nn.Module, StackedLayer] = {}
    for path, m in list(module.named_modules(remove_duplicate=False)):
        if any(path != one and within(path, one) for one in whole):
            continue
        if m not in made and path in whole:
            own = {name: at[id(p)] for name, p in m.named_parameters() if id(p) in at}
            made[m] = ByVmap(m, own, draws)
        elif m not in made and trains(m, set(at)):
            own = {name: at[id(p)] for name, p in m.named_parameters(recurse=False)}
            made[m] = FORMS[type(m)](m, own)
        if m in made and path:
            replace(module, path, made[m])
    return made.get(module, module), list(made.values())


def trains(m: nn.Module, at: Collection[int]) -> bool:
    """Whether parameters of its own train."""
    return any(id(p) in at for p in m.parameters(recurse=False))


def has_form(m: nn.Module, at: Collection[int]) -> bool:
    """Whether a layer that trains, all of it, computes what one of `FORMS` does."""
    form = FORMS.get(type(m))
    hooked = any(getattr(m, name) for name in HOOKS)
    all_of_it = all(id(p) in at for p in m.parameters(recurse=False))
    return form is not None and not hooked and all_of_it and form.takes(m)


def without_form(module: nn.Module, at: Collection[int], known: Collection[str]) -> dict[str, str]:
    """Paths of the smallest modules that must run by vmap: those `known`, and what shows here.

    That is a layer without a form, and what holds all places of a parameter that two modules share,
    which the value says, for a message on the whole module.
    """
    found, places = dict.fromkeys(known, ""), dict[int, list[str]]()
    for path, m in module.named_modules(remove_duplicate=False):
        if trains(m, at) and not has_form(m, at):
            own = next(name for name, p in m.named_parameters(recurse=False) if id(p) in at)
            found[path] = (
                f", for its parameter '{own}' is in no submodule: use vmap or loop, or move "
                f"'{own}' and what uses it into a submodule"
            )
        for p in m.parameters(recurse=False):
            if id(p) in at:
                places.setdefault(id(p), []).append(path)
    while True:
        split = [paths for paths in places.values() if apart(module, paths, found)]
        if not split:
            return found
        found |= {
            around(p): f", for {' and '.join(p)} share a parameter: use vmap or loop" for p in split
        }


def apart(module: nn.Module, paths: Iterable[str], whole: Iterable[str]) -> bool:
    """Whether places of a parameter come to lie in two layers."""

    def layer(path: str) -> nn.Module:
        outer = [one for one in whole if within(path, one)]
        return module.get_submodule(min(outer, key=len) if outer else path)

    return len({layer(path) for path in paths}) > 1


def within(path: str, whole: str) -> bool:
    """Whether `path` is that of a part of `whole`, or of itself."""
    return not whole or path == whole or path.startswith(f"{whole}.")


def around(paths: Iterable[str]) -> str:
    """The path of the smallest module that holds all of them."""
    common = []
    for names in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)
