"""Models in files, and runs that begin from one."""

from pathlib import Path

import pytest
import torch
from torch import nn

import vecfl.model_file as module
from vecfl.errors import InputError
from vecfl.model_file import load_model, save_model, warm_start


def test_a_saved_model_loads_as_a_state_dict(tmp_path: Path) -> None:
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    save_model(tmp_path / "model.pt", module.state_dict())
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(other.weight, module.weight) and torch.equal(other.bias, module.bias)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_both_formats_hold_tied_tensors_and_integers(tmp_path: Path, name: str) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    w = torch.arange(6.0).view(2, 3)
    state = {"a": w, "tied": w, "turned": w.T, "count": torch.tensor(3)}
    save_model(tmp_path / name, state)
    found = load_model(tmp_path / name)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert found["count"].dtype == torch.int64


def test_a_warm_start(tmp_path: Path) -> None:
    module, other = nn.Linear(3, 2), nn.Linear(3, 2).double()
    save_model(tmp_path / "model.pt", module.state_dict())
    warm_start(other, tmp_path / "model.pt")
    assert torch.equal(other.weight, module.weight.double())


class Planted:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a pickle was executed",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "model.pt: No such file or directory; expected a model"),
        (b"text", "model.pt: not a model: no file that torch or safetensors wrote"),
        ({"a": Planted()}, "model.pt: not a model: no file that torch or safetensors wrote"),
        ({"weight": torch.full((2, 3), torch.nan)}, "model.pt: tensor 'weight' is not finite"),
        ([1, 2], "model.pt: not a model: expected a state dict, names and tensors"),
        ({"a": 1}, "model.pt: not a model: expected a state dict, names and tensors"),
        ({"weight": torch.zeros(2, 3)}, r"'bias': missing there, \[2\] in this model"),
        (
            {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)},
            r"'weight': \[2, 4\] there, \[2, 3\] in this model",
        ),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "x": torch.zeros(1)},
            r"'x': \[1\] there, missing in this model",
        ),
    ],
)
def test_another_file_is_one_line(tmp_path: Path, content: object, said: str) -> None:
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    linear = nn.Linear(3, 2)
    before = linear.weight.detach().clone()
    with pytest.raises(InputError, match=said):
        warm_start(linear, path)
    assert torch.equal(linear.weight, before)


def test_safetensors_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "model.safetensors").write_bytes(b"")
    for act in (lambda p: save_model(p, {}), load_model):
        with pytest.raises(InputError, match=r'needs safetensors: pip install "vecfl\[export\]"$'):
            act(tmp_path / "model.safetensors")
