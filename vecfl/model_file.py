"""Models in files: the state dict of a module, as `torch.save` or safetensors write it."""

import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vecfl.errors import InputError
from vecfl.files import atomic_file

SAFE = ".safetensors"


def save_model(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write a state dict on the CPU, whole or not at all; `load_model(path)` reads it.

    In the safetensors format where `path` ends so, else as `torch.load` takes it; tied tensors are
    written under each of their names. Raises `OSError` with the path, and InputError where
    safetensors is missing.
    """
    tensors = {name: value.cpu().contiguous() for name, value in state_dict.items()}
    if path.suffix == SAFE:
        check_safetensors(str(path))
        import safetensors.torch

        data = memoryview(safetensors.torch.save({n: t.clone() for n, t in tensors.items()}))
    else:
        buffer = io.BytesIO()  # torch.save hides the OSError of a full disk in a RuntimeError
        torch.save(tensors, buffer)
        data = buffer.getbuffer()
    with atomic_file(path) as file:
        file.write(data)


def load_model(path: Path | str) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, or in one of `torch.save`; nothing is executed.

    Raises InputError, naming the file, where it cannot be read or holds anything but tensors.
    """
    path = Path(path).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a model") from error
    try:
        if path.suffix == SAFE:
            check_safetensors(str(path))
            import safetensors.torch

            return safetensors.torch.load(data)
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # of many kinds, for a file that is something else
        raise InputError(f"{path}: not a model: no file that torch or safetensors wrote") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise InputError(f"{path}: not a model: expected a state dict, names and tensors")
    return dict(found)


def warm_start(module: nn.Module, path: Path | str) -> None:
    """Give `module` the values in a file; InputError for the first name or shape that differs."""
    found, own = load_model(path), module.state_dict()
    for name, tensor in found.items():  # a mask of -inf is what it should be
        mask = name in own and torch.equal(own[name].to(tensor), tensor)
        if not mask and not tensor.isfinite().all():
            raise InputError(f"{path}: tensor {name!r} is not finite")
    for name in (*own, *found):
        there, here = (
            "missing" if tensor is None else str(list(tensor.shape))
            for tensor in (found.get(name), own.get(name))
        )
        if there != here:
            raise InputError(f"{path}: tensor {name!r}: {there} there, {here} in this model")
    module.load_state_dict(found)


def check_safetensors(who: str) -> None:
    """InputError, naming who wants it, where safetensors is missing."""
    if importlib.util.find_spec("safetensors") is None:
        raise InputError(f'{who} needs safetensors: pip install "vecfl[export]"')
