"""Compressed messages held to the loop: codecs x algorithms x backends x tasks x cohorts, float64.

Models, what arrives, residuals and bytes of three rounds of ragged clients, in a cover of all
pairs; and each codec, which may jump where a last bit differs, on the same rows.
"""

from functools import partial
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import vecfl
from vecfl.layout import Entry, Layout
from vecfl.transforms.codec import Senders
from vecfl.transforms.codec import encode as ours

from .bridge import codec as made
from .bridge import run_vecfl
from .codecs import encode
from .cover import Row, pairwise
from .loop import Setting, federated_loop
from .test_table import BACKENDS, COHORTS, DENSE, FROZEN, STACKED, TASKS, by_client, order

CODECS: dict[str, dict[str, Any]] = {
    "top_k": {"codec": ("top_k", 0.3)},
    "random_k": {"codec": ("random_k", 5, True)},
    "unscaled": {"codec": ("random_k", 0.5, False)},
    "sign": {"codec": ("sign", "tensor")},
    "qsgd": {"codec": ("qsgd", 7, "tensor")},
    "one level": {"codec": ("qsgd", 1, "message")},
    "stochastic": {"codec": ("stochastic", 3, "tensor")},
    "flute": {"codec": ("flute", 4, 0.6, 0.9, "tensor")},
    "flute, all": {"codec": ("flute", 2, None, 1.0, "message")},
    "top_k, kept": {"codec": ("top_k", 4), "feedback": True},
    "sign, kept": {"codec": ("sign", "message"), "feedback": True},
    "random, kept": {"codec": ("random_k", 0.3, False), "feedback": True},
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {"random_epochs": (0, 3, 0.8)},
    "fedsgd": {"algorithm": "fedsgd", "server_lr": 0.5},
    "dga": {"weighting": "rms", "softmax_beta": 5.0, "clips": (("norm", 0.1),)},
    "habit": {"algorithm": "habit", "epochs": 2, "clips": (("layer", 0.1),)},
    "scaffold": {"algorithm": "scaffold", "epochs": 2},
    "feddyn": {"algorithm": "feddyn", "dyn": 0.3},
    "fednova": {"algorithm": "fednova", "random_epochs": (0, 3, 0.8)},
    "late": {"weighting": "loss", "delays": (0.5, 0.3, 0.2), "buffer": 2, "discount": 0.5},
}
ROWS_OF_CLIENTS = ("habit", "scaffold", "feddyn")
PROBLEM_OF = {name: TASKS[name] for name in ("linear", "tokens", "buffers")} | {
    "one layer": FROZEN["one layer"]
}
KINDS = {name: BACKENDS[name] for name in ("loop S=1", "loop W=3", "vmap S=3", "vmap W=2")}
COLUMNS = {
    "codec": CODECS,
    "algorithm": ALGORITHMS,
    "backend": KINDS,
    "task": PROBLEM_OF,
    "cohort": COHORTS,
}
ROWS = pairwise({name: list(values) for name, values in COLUMNS.items()})
ROWS += [
    {"codec": codec, "algorithm": "fedavg", "backend": kind, "task": "positions", "cohort": "all"}
    for codec, kind in (("qsgd", "stacked S=3"), ("sign, kept", "stacked W=2"))
]


def setting_of(row: Row) -> Setting:
    fields = COHORTS[row["cohort"]] | ALGORITHMS[row["algorithm"]] | CODECS[row["codec"]]
    keeps = row["algorithm"] in ROWS_OF_CLIENTS or fields.get("feedback")
    if keeps and row["cohort"] == "repeats":  # a client has one row
        fields["cohort"] = tuple(tuple(dict.fromkeys(cohort)) for cohort in fields["cohort"])
    problem = (PROBLEM_OF | DENSE)[row["task"]]
    return Setting(seed=2**41 + 7, freeze=problem.freeze, **fields)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()))
def test_pairwise_cover(row: Row) -> None:
    problem, s = (PROBLEM_OF | DENSE)[row["task"]], setting_of(row)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    truth = federated_loop(problem.build(), problem.loss, problem.clients(), s)
    kind = (KINDS | STACKED)[row["backend"]]
    run = run_vecfl(problem.build(), problem.loss, problem.clients(), s, **kind)
    total = 0
    for t in range(s.rounds):
        close(run.models[t], truth.models[t])
        sent, right = by_client(run.updates[t]), sorted(truth.updates[t], key=order)
        assert [k for k, _, _ in sent] == [k for k, _, _ in right]
        for (_, mine, _), (_, theirs, _) in zip(sent, right, strict=True):
            close(mine, theirs)
        total += truth.bytes[t]
        told = run.metrics[t]
        assert (told["comm/up_bytes"], told["comm/total_up_bytes"]) == (truth.bytes[t], total)
        if s.feedback:
            (name,) = (name for name in run.rows[t] if name.endswith("residual"))
            close(run.rows[t][name], torch.stack(truth.residuals[t]))
            assert torch.stack(truth.residuals[t]).any()


def test_the_cover_holds_every_pair() -> None:
    for a, b in combinations(COLUMNS, 2):
        seen = {(row[a], row[b]) for row in ROWS}
        assert seen >= set(product(COLUMNS[a], COLUMNS[b])), (a, b)


def test_residuals_of_clients_that_come_back() -> None:
    """In the second round of four clients some have a residual and others come first."""
    s = setting_of(
        {"codec": "top_k, kept", "algorithm": "fedavg", "cohort": "four", "task": "linear"}
    )
    problem = PROBLEM_OF["linear"]
    truth = federated_loop(problem.build(), problem.loss, problem.clients(), s)
    before = [bool(truth.residuals[0][k].any()) for k, _, _ in truth.updates[1]]
    assert any(before) and not all(before)


SIZES = [3, 1, 6, 2]
LAYOUT = Layout(
    tuple(Entry(f"p{i}", (n,), sum(SIZES[:i]), torch.float64) for i, n in enumerate(SIZES))
)


def between(row: torch.Tensor, codec: tuple) -> bool:
    """Whether a number lies in the middle of two levels, but for its last bits."""
    sizes = SIZES * 2 if codec[-1] == "tensor" else [sum(SIZES)] * 2
    for part in row.split(sizes):
        step = (part.max() - part.min()) / (2 ** codec[1] - 1)
        if step > 0 and (((part - part.min()) / step % 1 - 0.5).abs() < 1e-9).any():
            return True
    return False


@pytest.mark.parametrize("name", CODECS)
def test_codecs_on_the_same_rows(name: str) -> None:
    """Of any numbers with ties, of two messages in a row."""
    of = Setting(**(CODECS[name] | {"feedback": False}))
    (transform,) = made(of)
    assert transform.codec is not None
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.25, 3.0]) | st.floats(-5, 5)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(values, min_size=24, max_size=24), st.integers(0, 9), st.integers(0, 2**40))
    def same(numbers: list[float], t: int, seed: int) -> None:
        row = torch.tensor(numbers, dtype=torch.float64)
        assume(of.codec[0] != "flute" or not between(row, of.codec))
        one = torch.tensor([1]), torch.tensor([2])
        assert transform.codec is not None
        arrived, size = ours(transform.codec(t), row[None], Senders(seed, t, *one, LAYOUT))
        right, bytes = encode(of.codec, row.numpy(), SIZES * 2, 2, seed, t, 1, 2)
        np.testing.assert_allclose(arrived[0].numpy(), right, rtol=1e-9, atol=1e-9)
        assert size.tolist() == [bytes]

    same()
    assert vecfl.chain(vecfl.fedsgd(lr=1), transform).coded
