"""Client weights of five clients, one of them without examples and one that took no step."""

import pytest
import torch
from torch import Tensor

from vecfl.algorithms import Finished, Round, by_examples, by_tokens, capped, uniform_weights
from vecfl.errors import InputError
from vecfl.layout import Layout

# Client 0 visited its 4 examples twice, with 20 tokens in all; client 2 has none; client 3 took
# no step; client 4 visited 2 of its 3 examples, 1 token each.
EXAMPLES, SEEN, TOKENS = [4, 10, 0, 5, 3], [8, 10, 0, 0, 2], [20.0, 10.0, 0.0, 0.0, 2.0]


def finished() -> Finished:
    nothing = torch.zeros(5, 1)
    return Finished(
        round=Round(0, 0, Layout(())),
        model=nothing,
        state=[],
        bias=None,
        client=torch.arange(5),
        occurrence=torch.zeros(5, dtype=torch.int64),
        examples=torch.tensor(EXAMPLES),
        loss=torch.full((5,), 99.0, dtype=torch.float64),
        weight=torch.tensor(TOKENS, dtype=torch.float64),
        seen=torch.tensor(SEEN),
    )


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (by_examples, [4, 10, 0, 5, 3]),
        (uniform_weights, [1, 1, 1, 1, 1]),
        (capped(4), [4, 4, 0, 4, 3]),
        (capped(100), [4, 10, 0, 5, 3]),
        (by_tokens, [4 * 20 / 8, 10, 0, 0, 3 * 2 / 2]),
    ],
    ids=["examples", "uniform", "capped", "capped high", "tokens"],
)
def test_weights(weights: object, expected: list[float]) -> None:
    result: Tensor = weights(finished())  # type: ignore[operator]
    assert result.tolist() == expected and result.dtype == torch.float64


@pytest.mark.parametrize("limit", [0, -3])
def test_a_cap_below_one_is_refused(limit: int) -> None:
    with pytest.raises(InputError) as error:
        capped(limit)
    assert str(error.value) == f"capped(limit={limit}): must be positive"
