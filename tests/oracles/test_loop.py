"""The oracle itself: published Philox vectors, counters packed by hand, and runs on paper."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from .hand import HAND
from .loop import Setting, federated_loop
from .philox import Words, amount, cohort, dropout_mask, philox, shuffle, subset, token_prefix
from .tiny import FAR, PLAIN, STEEP, Case, Line, client, squared

SEED = 0x1234_5678_9ABC  # low word 0x56789ABC, high word 0x1234


def block(*counter: int) -> Words:
    """The four words at a counter, under SEED."""
    return philox(np.array([counter], np.uint64), (0x56789ABC, 0x1234)).reshape(4)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    k0, k1 = (int(word, 16) for word in key.split())
    words = philox(np.array([[int(word, 16) for word in counter.split()]], np.uint64), (k0, k1))
    assert " ".join(f"{word:08x}" for word in words[0]) == expected


def test_cohort_is_the_clients_with_the_smallest_words() -> None:
    # Kind 0, round 3: six clients are the words of two blocks.
    words = np.concatenate([block(0, 0, 3 << 10, 0), block(1, 0, 3 << 10, 0)])[:6]
    drawn = cohort(SEED, 3, population=6, size=4)
    assert drawn.tolist() == sorted(range(6), key=lambda i: int(words[i]))[:4]
    assert drawn.tolist() != cohort(SEED, 4, population=6, size=4).tolist()


def test_subset_is_the_examples_with_the_smallest_words() -> None:
    words = np.concatenate([block(i, 9, 3 << 10, 1 << 28) for i in range(2)])[:7]
    assert subset(SEED, 3, 9, n=7, cap=3).tolist() == np.argsort(words)[:3].tolist()
    assert subset(SEED, 3, 9, n=7, cap=7).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_the_token_cap_goes_by_the_smallest_words() -> None:
    # In the order of the words of kind 1; the cap is reached by three, one token less by two.
    words = np.concatenate([block(i, 9, 3 << 10, 1 << 28) for i in range(2)])[:7]
    tokens = [5, 1, 4, 2, 7, 3, 6]
    most = sum(tokens[e] for e in np.argsort(words)[:3])
    kept = [token_prefix(SEED, 3, 9, tokens, cap) for cap in (most, most - 1, 1, 28, 27)]
    assert kept == [3, 2, 1, 7, 6]


def test_work_is_drawn_from_two_words_of_step_5() -> None:
    # Kind 0, round 3, second occurrence, client 9, step 5.
    word, straggles, *_ = (int(w) for w in block(0, 9, (3 << 10) + 1, 5))
    u = (straggles + 0.5) / 2**32
    at = (SEED, 3, 9, 2, 6)
    assert amount(*at, share=u + 1e-6, occurrence=1) == 2 + word * 5 // 2**32 != 6
    assert amount(*at, share=u - 1e-6, occurrence=1) == 6


def test_shuffle_sorts_the_words_of_the_epoch() -> None:
    words = np.concatenate([block(i, 9, 3 << 10, (2 << 28) + 5) for i in range(2)])[:7]
    assert shuffle(SEED, 3, 9, epoch=5, n=7).tolist() == np.argsort(words).tolist()


def test_dropout_takes_two_bits_for_a_quarter() -> None:
    # p = 1/4: q = 3 of 4, kept elements count 4/3. Layer 2, step 5. 20 elements: 16 lanes, then 4.
    word3 = (3 << 28) + (2 << 20) + 5
    first, second = (int(word) for word in block(0, 9, 3 << 10, word3)[:2])
    lanes = [first // 4**i % 4 for i in range(16)] + [second // 4**i % 4 for i in range(4)]
    mask = dropout_mask(SEED, 3, 9, 5, 2, 0.25, (4, 5))
    assert mask.reshape(-1).tolist() == [4 / 3 if lane < 3 else 0.0 for lane in lanes]


def test_dropout_cuts_words_into_bytes_where_p_is_a_multiple_of_1_256() -> None:
    # p = 101/256: q = 155 of 256, kept elements count 256 / 155.
    drawn = np.concatenate([block(i, 9, 0, 3 << 28) for i in range(2)])
    lanes = np.frombuffer(drawn.astype("<u4").tobytes(), np.uint8)[:20]
    mask = dropout_mask(SEED, 0, 9, 0, 0, 101 / 256, (20,))
    assert mask.tolist() == [256 / 155 if lane < 155 else 0.0 for lane in lanes]


def test_dropout_cuts_words_into_halves_where_p_is_no_multiple_of_1_256() -> None:
    # p = 0.3: q = round(0.7 * 65536) = round(45875.2).
    drawn = np.concatenate([block(i, 9, 0, 3 << 28) for i in range(2)])
    lanes = np.frombuffer(drawn.astype("<u4").tobytes(), np.uint16)[:10]
    mask = dropout_mask(SEED, 0, 9, 0, 0, 0.3, (10,))
    assert mask.tolist() == [65536 / 45875 if lane < 45875 else 0.0 for lane in lanes]


@pytest.mark.parametrize(("p", "value"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_at_the_ends(p: float, value: float) -> None:
    assert (dropout_mask(SEED, 0, 0, 0, 0, p, (3, 40)) == value).all()


@pytest.mark.parametrize("case", HAND, ids=lambda case: case.name)
def test_hand(case: Case) -> None:
    result = federated_loop(case.module(), case.loss_function, case.clients, case.setting)
    assert len(result.models) == len(case.expected)
    for state, expected in zip(result.models, case.expected, strict=True):
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert state[name].item() == pytest.approx(value, rel=1e-6), name
    assert result.loss == pytest.approx(case.loss, rel=1e-6, nan_ok=True)
    assert result.dropped == [list(case.dropped)] * len(case.expected)


def test_updates_and_weights() -> None:
    # As in the first hand case: updates 1 - 1.25 and 1 - 0, FedSGD: the gradients -1 and 4.
    clients = [client(FAR), client(STEEP, STEEP, STEEP)]
    averaging = federated_loop(Line(), squared, clients, Setting(rounds=1, lr=0.25))
    gradients = federated_loop(Line(), squared, clients, Setting(rounds=1, algorithm="fedsgd"))
    rows = [(k, row.tolist(), weight) for k, row, weight in averaging.updates[0]]
    assert rows == [(0, [-0.25], 1.0), (1, [1.0], 3.0)]
    rows = [(k, row.tolist(), weight) for k, row, weight in gradients.updates[0]]
    assert rows == [(0, [-1.0], 1.0), (1, [4.0], 3.0)]


def test_the_module_is_left_alone() -> None:
    module = Line().eval()
    federated_loop(module, squared, [client(FAR)], Setting(rounds=1))
    assert module.w.item() == 1.0 and module.w.grad is None and not module.training


class Recorder(Line):
    """Keeps what it is called with."""

    seen: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.tolist())
        return super().forward(x)


@pytest.fixture
def seen() -> list[list[float]]:
    Recorder.seen.clear()
    return Recorder.seen


def test_a_client_visits_its_subset_by_shuffled_epochs(seen: list[list[float]]) -> None:
    x = torch.arange(7.0)
    clients = [{"x": torch.empty(0), "y": torch.empty(0)}, {"x": x, "y": x}]
    setting = Setting(rounds=1, seed=SEED, batch=2, cap=5, last="wrap", epochs=2)
    federated_loop(Recorder(), squared, clients, setting)
    kept = subset(SEED, 0, 1, 7, 5)
    epochs = [kept[shuffle(SEED, 0, 1, epoch, 5)].tolist() for epoch in (0, 1)]
    expected = [[e[0:2], e[2:4], [e[4], e[0]]] for e in epochs]
    assert seen[1:] == expected[0] + expected[1]  # the first call looks for buffers


def test_a_drawn_cohort_trains_in_the_order_of_the_draw() -> None:
    clients = [client(PLAIN)] * 6
    result = federated_loop(Line(), squared, clients, Setting(rounds=2, cohort=4, sample_seed=SEED))
    members = [[k for k, _, _ in updates] for updates in result.updates]
    assert members == [cohort(SEED, t, 6, 4).tolist() for t in (0, 1)]


def test_bytes_become_fractions(seen: list[list[float]]) -> None:
    data = {"x": torch.tensor([51], dtype=torch.uint8), "y": torch.tensor([3])}
    federated_loop(Recorder(), squared, [data], Setting(rounds=1, lr=1.0))
    assert seen[-1] == pytest.approx([0.2])


class Drops(Line):
    """y = w x with dropout before and after, called in another order than it is defined."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Dropout(0.3)
        self.before = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(self.before(x)))


def test_dropout_counts_layers_by_call_and_steps_by_batch() -> None:
    # y = b a w x with masks b (layer 0) and a (layer 1); loss y^2 / 2, lr 1/2, x = 1:
    # w <- w - w mean((a b)^2) / 2, over batches of 3 and 2 examples in steps 0 and 1 of round 1.
    clients = [client(), client(*[PLAIN] * 5)]
    setting = Setting(rounds=2, seed=SEED, lr=0.5, batch=3)
    result = federated_loop(Drops(), squared, clients, setting)
    w = result.models[0]["w"].item()
    for step, size in enumerate([3, 2]):
        before = dropout_mask(SEED, 1, 1, step, 0, 0.5, (size,))
        after = dropout_mask(SEED, 1, 1, step, 1, 0.3, (size,))
        w -= 0.5 * w * ((before * after) ** 2).mean()
    assert result.models[1]["w"].item() == pytest.approx(w, rel=1e-5)


class Off(Drops):
    """The dropout before is kept off."""

    def train(self, mode: bool = True) -> "Off":
        super().train(mode)
        self.before.eval()
        return self


def test_dropout_that_a_module_keeps_off_is_off_and_counts_as_no_layer() -> None:
    # y = a w x with mask a of layer 0: w <- w - w mean(a^2) / 2.
    setting = Setting(rounds=1, seed=SEED, lr=0.5, batch=3)
    result = federated_loop(Off(), squared, [client(*[PLAIN] * 3)], setting)
    a = dropout_mask(SEED, 0, 0, 0, 0, 0.3, (3,))
    start = Off().w.item()
    assert result.models[0]["w"].item() == pytest.approx(start - start * (a**2).mean() / 2)


class Channels(nn.Module):
    """y_c = w_c times the mean of channel c, which is dropped as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * self.drop(x).mean((2, 3))).sum(1)


def test_channel_dropout_draws_one_lane_a_channel() -> None:
    # Loss y over examples of ones: w_c <- w_c - mean over examples of the mask of channel c.
    def plain(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return output, torch.ones_like(output)

    clients = [{"x": torch.ones(4, 3, 2, 2)}]
    result = federated_loop(Channels(), plain, clients, Setting(rounds=1, seed=SEED, lr=1.0))
    mask = dropout_mask(SEED, 0, 0, 0, 0, 0.5, (4, 3))
    assert result.models[0]["w"].tolist() == pytest.approx((1 - mask.mean(0)).tolist())
    assert 0 < mask.mean() < 2
