"""The model for texts by its size, what it may look at, and as clients train it."""

import torch

import vecfl
from vecfl.data import FederatedDataset
from vecfl.models import WindowLM


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


def test_backends_agree() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 11, (7, 6))
    y = torch.randint(0, 11, (7, 6))
    y[:, 4:] = -100
    data = FederatedDataset.from_arrays({"x": x, "y": y}, [0, 0, 0, 1, 2, 2, 2])
    module = WindowLM(11, context=4, embedding=3, hidden=8)
    task = vecfl.Task(module, vecfl.cross_entropy, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=0.5, batches=vecfl.Batches(size=2, epochs=1))
    models = []
    for backend in ("vmap", "loop"):
        sim = vecfl.Simulation(
            *(task, data, algorithm, vecfl.everyone()),
            **{"backend": backend, "slots": 2, "seed": 3, "dtype": torch.float64},
        )
        state, _ = sim.round(sim.start())
        models.append(state.server["w"])
    assert (models[0] - sim.start().server["w"]).abs().max() > 1e-3  # it moved
    assert torch.allclose(*models, rtol=0, atol=1e-9)
