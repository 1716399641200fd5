"""Codecs by themselves: bytes there and back, laws, bounds, and rows that are hard on numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vecfl
from vecfl import Transform
from vecfl.errors import InputError
from vecfl.layout import Entry, Layout
from vecfl.transforms.codec import Senders, encode, pack, unpack
from vecfl.transforms.flute import quantile_of

TYPES = (torch.float32, torch.float64)
CODECS: dict[str, Transform] = {
    "top_k": vecfl.top_k(0.3),
    "one": vecfl.top_k(1),
    "most": vecfl.top_k(0.9),
    "everything": vecfl.top_k(1.0),
    "random_k": vecfl.random_k(0.3, scaled=False),
    "scaled": vecfl.random_k(1),
    "sign": vecfl.scaled_sign(),
    "one sign": vecfl.scaled_sign("message"),
    "qsgd": vecfl.qsgd(),
    "ternary": vecfl.qsgd(1, "message"),
    "fine": vecfl.qsgd(32767),
    "stochastic": vecfl.stochastic_quantizer(),
    "two levels": vecfl.stochastic_quantizer(1),
    "16 bits": vecfl.stochastic_quantizer(16, "message"),
    "flute": vecfl.flute_quantizer(),
    "flute, half": vecfl.flute_quantizer(3, threshold=0.5),
    "flute, few": vecfl.flute_quantizer(16, threshold=0.95, per="message"),
}
CONTRACTIVE = ("top_k", "one", "most", "everything", "random_k", "sign", "one sign")
UNBIASED = ("scaled", "qsgd", "ternary", "stochastic", "two levels")


def layout(sizes: list[int]) -> Layout:
    at = [sum(sizes[:i]) for i in range(len(sizes))]
    entries = zip(sizes, at, strict=True)
    made = [Entry(f"t{i}", (n,), start, torch.float32) for i, (n, start) in enumerate(entries)]
    return Layout(tuple(made[:1]), tuple(made[1:]))


def senders(sizes: list[int], clients: int = 1, round: int = 3, first: int = 0) -> Senders:
    client = torch.arange(first, first + clients)
    return Senders(11, round, client, torch.ones_like(client), layout(sizes))


def sent(name: str, rows: Tensor, sizes: list[int] | None = None) -> Tensor:
    codec = CODECS[name].codec
    assert codec is not None
    return encode(codec(3), rows, senders(sizes or [rows.shape[1]], len(rows)))[0]


def numbers(dtype: torch.dtype) -> st.SearchStrategy[float]:
    width: Any = 64 if dtype == torch.float64 else 32
    usual = st.floats(-2, 2, width=width) | st.sampled_from([0.0, -0.0, 1.0, -1.0])
    return usual | st.floats(allow_nan=False, allow_infinity=False, width=width)


def messages(dtype: torch.dtype) -> st.SearchStrategy[tuple[list[int], list[float]]]:
    """Sizes of tensors, and the numbers of a row or of two."""
    sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    return st.tuples(sizes, st.integers(1, 2)).flatmap(
        lambda of: st.tuples(
            st.just(of[0]),
            st.lists(numbers(dtype), min_size=sum(of[0]) * of[1], max_size=sum(of[0]) * of[1])
            | st.builds(lambda x, n: [x] * n, numbers(dtype), st.just(sum(of[0]))),
        )
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_bytes_there_and_back(name: str, dtype: torch.dtype) -> None:
    """What is unpacked has the bits of what the run has, and the run counts the bytes; among
    others, of a row in company, whose bits are those that it has alone."""
    codec = CODECS[name].codec
    assert codec is not None

    @settings(max_examples=20, deadline=None)
    @given(messages(dtype))
    @example(([9, 9], [0.0] * 18))
    @example(([1], [torch.finfo(dtype).max]))
    @example(([3], [torch.finfo(dtype).max, -torch.finfo(dtype).max, 1.0]))
    @example(([2, 2], [torch.finfo(dtype).smallest_normal / 8, 0.0, 1.0, 1.0]))
    def same(message: tuple[list[int], list[float]]) -> None:
        sizes, values = message
        row = torch.tensor(values, dtype=dtype)
        rows = torch.stack((row.flip(0), row, row / 2))
        arrived, bytes = encode(codec(3), rows, senders(sizes, 3, first=6))
        alone = senders(sizes, 1, first=7)
        data = pack(codec(3), row, alone)
        found = unpack(codec(3), data, len(row), dtype, alone)
        assert found.numpy().tobytes() == arrived[1].numpy().tobytes()
        assert len(data) == bytes[1]

    same()


def test_bytes_by_hand() -> None:
    """Of 10 numbers in tensors of 7 and 3, float32. 3 of 10 are kept: positions of 4 bits take
    12, a bit for each 10: 10 + 96 bits. One: 4 + 32. 9 of 10: 10 + 288. All: 320. Drawn: 96.
    Signs: twice 32, and 10. QSGD: twice 32, and 8 (127), 2 (1, one scale) or 16 bits each. Levels:
    four times 32, and 8 or 1 bits each. FLUTE: 128 and 100 bits; of half of 7 (the median and
    three below it go) and of 3 numbers, 3 and 1 remain: twice 32 + 64; a bit for each of 7
    (positions: 9), a position of 2 bits (each: 3); 4 symbols of 3 bits."""
    row = torch.tensor([5.0, -4, 3, -2, 1, -0.5, 0.1, 7, -8, 9])
    right = {"top_k": 106, "one": 36, "most": 298, "everything": 320, "random_k": 96}
    right |= {"scaled": 32, "sign": 74, "one sign": 42, "qsgd": 64 + 80, "ternary": 52}
    right |= {"fine": 64 + 160, "stochastic": 128 + 80, "two levels": 138, "16 bits": 224}
    right |= {"flute": 228, "flute, half": 2 * 96 + 7 + 2 + 12}
    right |= {"flute, few": 32 + 64 + 4 + 16}
    for name, bits in right.items():
        codec = CODECS[name].codec
        assert codec is not None
        data = pack(codec(3), row, senders([7, 3]))
        _, counted = encode(codec(3), row[None], senders([7, 3]))
        assert len(data) == int(counted) == math.ceil(bits / 8), name
    assert right.keys() == CODECS.keys()


@pytest.mark.parametrize("levels", [1, 3, 7, 127, 32767])
def test_no_level_is_above_the_last(levels: int) -> None:
    """|x| / |x| * levels may round to more than levels; a draw of 0 would take it up."""
    codec = vecfl.qsgd(levels).codec
    assert codec is not None
    rows = torch.rand(4000, 1, generator=torch.Generator().manual_seed(2)) - 0.5
    symbols = codec(0).quantise(rows, torch.zeros(4000, 1, dtype=torch.int64)).symbols
    assert symbols.min() >= 0 and symbols.max() <= 2 * levels


def test_numbers_that_a_factor_takes_out_of_range() -> None:
    """1e38 times 4 is no float32: the row is not finite, so that its client is dropped."""
    assert sent("scaled", torch.full((1, 4), 1e38)).abs().max() == math.inf


@pytest.mark.parametrize("make", [vecfl.top_k, vecfl.random_k, vecfl.qsgd])
def test_integers_of_numpy(make: Any) -> None:
    found = []
    for number in (3, np.int64(3)):
        codec = make(number).codec
        assert codec is not None
        found.append(encode(codec(0), torch.arange(9.0)[None], senders([9])))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_bits_by_hand() -> None:
    """Signs of (2, -1, 0, 3, -4): the scale 2 is 0x40000000, then 1 0 1 1 0 and three zeros. The
    largest of five is at 4, in three bits, and -4 is 0xC0800000: 100 1100 0000 1000..."""
    row, codecs = torch.tensor([2.0, -1, 0, 3, -4]), (vecfl.scaled_sign(), vecfl.top_k(1))
    signs, largest = (pack(t.codec(0), row, senders([5])) for t in codecs if t.codec)
    assert signs == bytes([0x40, 0, 0, 0, 0b10110000])
    assert largest == ((0b100 << 32 | 0xC0800000) << 5).to_bytes(5, "big")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", CONTRACTIVE)
def test_contraction(name: str, dtype: torch.dtype) -> None:
    """|x - C(x)|^2 <= (1 - d) |x|^2: top-k has d = k / M, the others 0 at least. Signs have
    d = |x|_1^2 / (n |x|^2) over all numbers; random-k has k / M in the mean alone."""
    share = {"top_k": 0.3, "one": 0.0, "most": 0.9, "everything": 1.0}

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30))
    def holds(values: list[float]) -> None:
        x = torch.tensor([values], dtype=dtype)
        n = len(values)
        kept = 1 if name == "one" else max(1, round(share.get(name, 0) * n))
        delta = kept / n if name in share else 0.0
        square = float(x.double().square().sum())
        if name == "one sign":
            delta = float(x.double().abs().sum()) ** 2 / (n * square) if square else 1.0
        if x.abs().amax() < torch.finfo(dtype).tiny:  # a mean of denormal numbers is rounded
            delta = 0.0
        lost = float((x - sent(name, x)).double().square().sum())
        assert lost <= (1 - delta) * square * (1 + 1e-5) + square * 1e-6

    holds()


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_is_the_message(name: str) -> None:
    """Over 20,000 rounds, |mean - x| of each of 12 numbers is below 4.9 standard errors, of the
    variance that was found: false alarms of all numbers and codecs have a probability of 6e-5, if
    seeds were drawn. A bias of 4 % of a standard deviation would be seen."""
    x = torch.rand(12, generator=torch.Generator().manual_seed(4)).double() * 2 - 1
    codec, clients = CODECS[name].codec, 20_000
    assert codec is not None
    arrived, _ = encode(codec(0), x.repeat(clients, 1), senders([5, 7], clients))
    error = arrived.std(0) / clients**0.5
    assert ((arrived.mean(0) - x).abs() <= 4.9 * error + 1e-12).all()
    assert (arrived.std(0) > 1e-3).sum() >= 6  # it is drawn
    pairs = torch.corrcoef(arrived.T[arrived.std(0) > 1e-3]).fill_diagonal_(0)
    if name != "scaled":  # of numbers that are rounded by themselves
        assert pairs.abs().max() < 5 / clients**0.5


def test_the_variance_of_qsgd() -> None:
    """At most min(n / s^2, sqrt(n) / s) |x|^2 (Lemma 3.1), and that of Bernoulli draws."""
    x = torch.tensor([0.3, -0.7, 0.05, 0.0, 1.1]).double()
    s, norm = 3, float(x.norm())
    codec = vecfl.qsgd(s).codec
    assert codec is not None
    arrived, _ = encode(codec(0), x.repeat(20_000, 1), senders([5], 20_000))
    place = x.abs() / norm * s
    part = place - place.floor()
    variance = (norm / s) ** 2 * part * (1 - part)
    torch.testing.assert_close(arrived.var(0), variance, rtol=0.04, atol=1e-12)
    assert float(variance.sum()) <= min(5 / s**2, 5**0.5 / s) * norm**2


def test_draws_are_those_of_the_sender() -> None:
    """Another client, round, occurrence or seed draws anew; the same one draws the same."""
    codec = CODECS["qsgd"].codec
    assert codec is not None
    x, one = torch.linspace(-1, 1, 40)[None], torch.ones(1, dtype=torch.int64)
    keys = [(11, 3, 0, 1), (12, 3, 0, 1), (11, 4, 0, 1), (11, 3, 1, 1), (11, 3, 0, 2)]
    found = [
        encode(codec(0), x, Senders(seed, t, one * client, one * times, layout([40])))[0]
        for seed, t, client, times in keys * 2
    ]
    assert all(torch.equal(found[i], found[i + 5]) for i in range(5))
    assert len({tuple(row[0].tolist()) for row in found}) == 5


def test_draws_do_not_depend_on_how_they_are_cut() -> None:
    """70,000 words of a row and of one in company: more than are made at a time."""
    three, one = senders([70_000], 3), senders([70_000], 1, first=2)
    assert torch.equal(three.words(70_000)[2], one.words(70_000)[0])
    assert torch.equal(three.words(70_000)[:, :9], three.words(9))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-3, 3) | st.sampled_from([0.0, 0.5, -0.5]), min_size=1, max_size=30),
    st.integers(1, 8),
    st.sampled_from([None, 0.0, 0.25, 0.5, 0.9, 1.0]),
)
def test_flute_by_its_definition(values: list[float], bits: int, share: float | None) -> None:
    """The nearest of 2^bits levels by `torch.bucketize` of g - half a step, and 0 up to the
    quantile by `torch.quantile`; half a step to either side may go by the last bit."""
    g = torch.tensor(values).double()
    levels = torch.linspace(float(g.min()), float(g.max()), 2**bits).double()
    step = float(g.max() - g.min()) / (2**bits - 1)
    right = levels[torch.bucketize(g - step / 2, levels).clamp(max=2**bits - 1)]
    sure = torch.ones_like(g, dtype=torch.bool)
    if share is not None:
        cut = g.abs().quantile(share)
        right[g.abs() <= cut] = 0
        sure = ((g.abs() - cut).abs() > 1e-9) | (g.abs() == cut)
    codec = vecfl.flute_quantizer(bits, share).codec
    assert codec is not None
    found = encode(codec(0), g[None], senders([len(values)]))[0][0]
    if step > 1e-6:
        sure &= ((g - g.min()) / step % 1 - 0.5).abs() > 1e-6
    torch.testing.assert_close(found[sure], right[sure], rtol=1e-5, atol=1e-6)
    kept = found != 0
    assert ((found - g).abs()[kept] <= step / 2 * (1 + 1e-6) + 1e-12).all()


def test_flute_by_hand() -> None:
    """Levels of two bits over -1..2 are -1, 0, 1, 2. 0.5 lies between two: the lower one. The
    quantile 0.5 of 0.4 0.5 1 1.6 2 is 1: two remain. 0.6 is at 2.4 of 0..4, 1 + 0.4 * 0.6."""
    x = torch.tensor([[-1.0, 0.4, 0.5, 1.6, 2.0]]).double()
    plain, half, more = (vecfl.flute_quantizer(2, share) for share in (None, 0.5, 0.6))
    rows = [
        encode(t.codec(0), x, senders([5]))[0][0].tolist() for t in (plain, half, more) if t.codec
    ]
    assert rows == [[-1, 0, 0, 2, 2], [0, 0, 0, 2, 2], [0, 0, 0, 2, 2]]
    assert float(quantile_of(x.abs(), 0.6)) == pytest.approx(1.24)
    for share in (0.0, 0.1, 0.33, 0.75, 1.0):
        right = np.quantile(x.abs().numpy(), share)
        assert float(quantile_of(x.abs(), share)) == pytest.approx(right, rel=1e-12)


def test_flute_anneals_by_round() -> None:
    """0.8 * 0.5^(r + 1) of eleven numbers 0..10: up to 4, 2 and 1 become 0; and bits 3, 2, 1.
    5..10 go to 3, 4, 5, 6, 6, 7 of 7 levels; 3..10 to 1, 1, 1, 2, 2, 2, 3, 3 of 3; 2..5 to 0."""
    x = torch.arange(11.0)[None]
    transform = vecfl.flute_quantizer(lambda t: 3 - t, threshold=0.8, anneal=0.5)
    assert transform.codec is not None
    rows = [encode(transform.codec(t), x, senders([11]))[0][0] for t in range(3)]
    assert [int((row == 0).sum()) for row in rows] == [5, 3, 6]  # of 1 bit half goes to level 0
    assert [len(set(row.tolist()) - {0.0}) for row in rows] == [5, 3, 1]
    with pytest.raises(InputError, match="in round 4: expected 1 to 16 bits, got 0"):
        transform.codec(3)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_hard_rows(dtype: torch.dtype) -> None:
    """Zeros stay, constant rows keep their value, numbers at both ends of the range keep their
    sign and stay near, and one number alone is itself."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal / 4
    for name in CODECS:
        assert not sent(name, torch.zeros(1, 7, dtype=dtype)).any(), name
    for name in ("sign", "one sign", "qsgd", "stochastic", "two levels", "16 bits", "flute"):
        for value in (1.0, -0.7, 1e-30, info.max, -info.max, tiny):
            row = torch.full((1, 1), value, dtype=dtype)
            torch.testing.assert_close(sent(name, row), row, rtol=1e-6, atol=0)
            row = torch.full((1, 5), value, dtype=dtype)
            if name != "qsgd":
                torch.testing.assert_close(sent(name, row), row, rtol=1e-6, atol=0)
    for scale in (info.max, tiny):
        row = torch.tensor([[1.0, -1.0, 0.5, -0.25, 0.0]], dtype=dtype) * scale
        for name, off in (("fine", 2e-4), ("16 bits", 1e-4), ("flute", 2e-3), ("stochastic", 0.02)):
            near = sent(name, row)
            assert near.isfinite().all()
            assert (near / 2 - row / 2).abs().max() <= scale * off, (name, scale)


def test_top_k_takes_the_first_of_equal_ones() -> None:
    """Of -2, 1, 2, 2, 1 two are -2 and the first 2; three are all 2; four take the first 1."""
    x = torch.tensor([[-2.0, 1, 2, 2, 1], [0, 0, 0, 0, 0]])
    for k, kept in ((1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])):
        codec = vecfl.top_k(k).codec
        assert codec is not None
        arrived, _ = encode(codec(0), x, senders([5], 2))
        assert arrived[0].nonzero().flatten().tolist() == kept
        torch.testing.assert_close(arrived[0][kept], x[0][kept], rtol=0, atol=0)


def test_random_k_is_uniform() -> None:
    """Each of 10 positions in 3 of 10 rounds: 20,000 draws, 5 standard errors; 6e-6 in all."""
    x = torch.ones(20_000, 10)
    codec = vecfl.random_k(3, scaled=False).codec
    assert codec is not None
    arrived, _ = encode(codec(0), x, senders([10], 20_000))
    assert (arrived.sum(1) == 3).all()
    assert ((arrived.mean(0) - 0.3).abs() < 5 * (0.21 / 20_000) ** 0.5).all()


def test_signs_by_hand() -> None:
    """(1, -3) and (0, 2, -4): means 2 and 2; over all five 2. Zero goes up."""
    x = torch.tensor([[1.0, -3, 0, 2, -4]])
    assert sent("sign", x, [2, 3]).tolist() == [[2, -2, 2, 2, -2]]
    assert sent("one sign", x * 3).tolist() == [[6, -6, 6, 6, -6]]


def test_two_messages_in_a_row() -> None:
    """Of an algorithm that sends two rows of 3: the scales are those of four parts."""
    x = torch.tensor([[1.0, -3, 5, 10, -30, 50]])
    assert sent("sign", x, [2, 1]).tolist() == [[2, -2, 5, 20, -20, 50]]
    with pytest.raises(InputError, match="a message of 7 numbers: expected a multiple of 3"):
        sent("sign", torch.ones(1, 7), [2, 1])


WRONG = [
    (lambda: vecfl.top_k(0), r"top_k\(0\): expected a number from 1, or a share such as 0.01"),
    (lambda: vecfl.top_k(1.5), r"top_k\(1.5\): expected a number from 1"),
    (lambda: vecfl.top_k(True), r"top_k\(True\): expected"),
    (lambda: vecfl.random_k(-0.1), r"random_k\(-0.1\): expected"),
    (lambda: vecfl.scaled_sign(1.0), r'scaled_sign\(per=1.0\): expected "tensor" or "message"'),
    (lambda: vecfl.qsgd(0), r"qsgd\(0\): expected a number of levels, 1 to 32767"),
    (lambda: vecfl.qsgd(1 << 15), r"qsgd\(32768\)"),
    (lambda: vecfl.qsgd(3, "row"), r"qsgd\(per='row'\)"),
    (lambda: vecfl.stochastic_quantizer(17), "stochastic_quantizer: expected 1 to 16 bits, got 17"),
    (lambda: vecfl.flute_quantizer(0), "flute_quantizer: expected 1 to 16 bits, got 0"),
    (lambda: vecfl.flute_quantizer(8, 1.2), r"flute_quantizer\(threshold=1.2\): expected a quant"),
    (lambda: vecfl.flute_quantizer(8, 0.5, 0), r"flute_quantizer\(anneal=0\): must be positive"),
    (lambda: vecfl.error_feedback(vecfl.qsgd()), "error_feedback: qsgd 127 per tensor is unbiased"),
    (lambda: vecfl.error_feedback(vecfl.stochastic_quantizer()), "is unbiased, not contractive"),
    (lambda: vecfl.error_feedback(vecfl.random_k(3)), "scaled by M / k, so it is not contractive"),
    (lambda: vecfl.error_feedback(vecfl.flute_quantizer()), "not contractive: a small number"),
    (lambda: vecfl.error_feedback(vecfl.clip_by_norm(1)), "clip_by_norm 1.0 is no codec; give top"),
    (
        lambda: vecfl.error_feedback(vecfl.error_feedback(vecfl.top_k(1))),
        "error_feedback top_k 1 has residuals already",
    ),
    (
        lambda: vecfl.chain(vecfl.fedsgd(lr=1), vecfl.top_k(1), vecfl.clip_by_norm(1)),
        r"clip_by_norm 1.0 stands behind a codec \(fedsgd, top_k 1\): what is encoded cannot",
    ),
    (
        lambda: vecfl.chain(vecfl.chain(vecfl.fedsgd(lr=1), vecfl.qsgd()), vecfl.top_k(1)),
        r"top_k 1 stands behind a codec",
    ),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[said[:24] for _, said in WRONG])
def test_what_is_refused(wrong: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        wrong()


def test_a_message_has_so_many_numbers() -> None:
    for transform in (vecfl.top_k(4), vecfl.error_feedback(vecfl.random_k(4, False))):
        transform.init(layout([4]))
        with pytest.raises(InputError, match=r"_k\(4\): a message has 3 numbers"):
            transform.init(layout([3]))
