"""The models for texts by their sizes, what they may look at, and as clients train them."""

import pytest
import torch
from torch import nn

from tests.models.rounds import check_backends_agree
from vecfl.models import CharGRU, CharLSTM, WindowLM


def test_parameter_count_by_hand() -> None:
    # 90 embeddings of 16; 10 * 16 = 160 inputs to 512; 512 to 90 logits.
    count = sum(p.numel() for p in WindowLM(90).parameters())
    assert count == 90 * 16 + (160 * 512 + 512) + (512 * 90 + 90) == 130_042


def test_it_sees_the_last_tokens_and_none_ahead() -> None:
    torch.manual_seed(0)
    module = WindowLM(11, context=4, embedding=3, hidden=8).double()
    ids = torch.randint(0, 11, (1, 9))
    logits = module(ids)
    assert logits.shape == (1, 9, 11)
    for place in range(9):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 11
        changed = (module(other) != logits).any(-1)[0].nonzero().flatten().tolist()
        assert changed == list(range(place, min(place + 4, 9)))


def test_logits_by_hand() -> None:
    # Embedding of token t is t; the hidden layer weighs the last three 100, 10, 1, oldest first;
    # the logits are the hidden value and nothing else.
    module = WindowLM(10, context=3, embedding=1, hidden=1)
    with torch.no_grad():
        module.embedding.weight.copy_(torch.arange(10.0)[:, None])
        module.hidden.weight.copy_(torch.tensor([[100.0, 10.0, 1.0]]))
        module.logits.weight.fill_(1)
        for layer in (module.hidden, module.logits):
            layer.bias.zero_()
    assert module(torch.tensor([[7, 2, 5, 4]]))[0, :, 0].tolist() == [7, 72, 725, 254]


@pytest.mark.parametrize(
    "module",
    [WindowLM(11, context=4, embedding=3, hidden=8), CharLSTM(11, 3, 8), CharGRU(11, 3, 8)],
)
def test_backends_agree(module: nn.Module) -> None:
    torch.manual_seed(0)
    x, y = torch.randint(0, 11, (2, 7, 6))
    y[:, 4:] = -100
    check_backends_agree(module, x, y, lr=0.5)


def test_parameter_counts_of_the_recurrent_models() -> None:
    # 4 gates of 256 rows: weights of the 8 or 256 inputs and of 256 states, and two biases.
    gate = [256 * (inputs + 256 + 2) for inputs in (8, 256)]
    count = sum(p.numel() for p in CharLSTM().parameters())
    assert count == 90 * 8 + 4 * sum(gate) + (256 * 90 + 90) == 822_570
    count = sum(p.numel() for p in CharGRU().parameters())
    assert count == 90 * 8 + 3 * sum(gate) + (256 * 90 + 90) == 622_890


@pytest.mark.parametrize("make", [CharLSTM, CharGRU])
def test_recurrent_models_see_all_tokens_before_and_none_ahead(make: type[CharLSTM]) -> None:
    torch.manual_seed(0)
    module, ids = make(11, embedding=3, hidden=8).double(), torch.randint(0, 11, (2, 6))
    logits = module(ids)
    assert logits.shape == (2, 6, 11)
    for place in range(6):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 11
        changed = (module(other) != logits).any(-1)
        assert changed[0].nonzero().flatten().tolist() == list(range(place, 6))
        assert not changed[1].any()


@pytest.mark.parametrize(
    ("make", "plain"),
    [(CharLSTM, nn.LSTM(8, 256, 2, batch_first=True)), (CharGRU, nn.GRU(8, 256, 2, True, True))],
)
def test_recurrent_layers_are_those_of_torch(make: type[CharLSTM], plain: nn.RNNBase) -> None:
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, 5, 8)
    plain.load_state_dict(module.recurrent.state_dict())
    for ours, theirs in zip(module.recurrent(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    other = make()
    other.recurrent.load_state_dict(plain.state_dict())
    assert torch.equal(other.recurrent.weight_hh_l1, module.recurrent.weight_hh_l1)
