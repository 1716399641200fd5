"""Vocabularies, windows and encoders: ids by hand, and the real texts."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.real import DATA, real
from vecfl.data import leaf_clients, read_leaf, read_leaf_pair, read_tff
from vecfl.data.text import (
    Vocabulary,
    characters,
    leaf_characters,
    next_character,
    padded,
    sentences,
    tff_characters,
    tweets,
    windows,
    word_vocabulary,
)
from vecfl.errors import InputError


def test_ids_of_tff() -> None:
    vocabulary = tff_characters()
    # 86 characters, d first and the carriage return last; then unk, bos, eos.
    assert len(vocabulary) == 90
    assert vocabulary.encode("dh\r\u00e9").tolist() == [1, 2, 86, 87]
    assert [vocabulary.special(t) for t in ("<pad>", "<unk>", "<bos>", "<eos>")] == [0, 87, 88, 89]
    assert vocabulary.decode([1, 89]) == ["d", "<eos>"]
    assert len(leaf_characters()) == 81
    assert leaf_characters().encode("\n }~").tolist() == [0, 1, 79, 80]


def test_words_by_frequency_then_alphabet() -> None:
    vocabulary = word_vocabulary(["b a c", "a  c\n", "a <pad>"], words=2)
    assert vocabulary.tokens == ("<pad>", "a", "c", "<unk>", "<bos>", "<eos>")
    assert vocabulary.encode(["c", "b"]).tolist() == [2, 3]
    with pytest.raises(InputError, match="words: expected an integer >= 1, got 0"):
        word_vocabulary(["a"], 0)
    with pytest.raises(InputError, match="^vocabulary: token 'a' occurs twice; tokens must be dis"):
        Vocabulary(("a", "b", "a"))
    with pytest.raises(InputError, match="^token 'c' is not in the vocabulary, nor is <unk>$"):
        Vocabulary(("a", "b")).encode("ac")
    with pytest.raises(InputError, match="^vocabulary: no <bos> among its 2 tokens$"):
        characters(Vocabulary(("a", "<pad>")), 3)


def test_windows_by_hand() -> None:
    # 6 ids have 5 next tokens. Length 3: one whole window and one with 2 of 3.
    x, y = windows([1, 2, 3, 4, 5, 6], 3, pad=9)
    assert x.tolist() == [[1, 2, 3], [4, 5, 9]] and y.tolist() == [[2, 3, 4], [5, 6, -100]]
    # Stride 2: windows from 0 and 2; the second ends with the sequence.
    x, y = windows([1, 2, 3, 4, 5, 6], 3, stride=2)
    assert x.tolist() == [[1, 2, 3], [3, 4, 5]] and y.tolist() == [[2, 3, 4], [4, 5, 6]]
    assert windows([1, 2], 3)[1].tolist() == [[2, -100, -100]]
    assert [part.shape for part in windows([1], 3)] == [(0, 3), (0, 3)]
    assert windows([], 2)[0].shape == (0, 2)
    with pytest.raises(InputError, match="^stride: expected 1..3, the length, got 4; tokens are"):
        windows([1, 2], 3, 4)


@given(n=st.integers(0, 30), length=st.integers(1, 8), data=st.data())
def test_windows_predict_every_token(n: int, length: int, data: Any) -> None:
    stride = data.draw(st.integers(1, length))
    x, y = windows(range(n), length, stride)
    real = y != -100
    assert (y[real] == x[real] + 1).all() and (x[~real] == 0).all()
    assert set(y[real].tolist()) == set(range(1, n))
    if stride == length:
        assert real.sum() == max(n - 1, 0)
    assert real.any(1).all() and (~real).any(1).sum() <= 1  # no window without a token to predict


def test_padding_cuts_at_the_end() -> None:
    assert padded([[1, 2, 3], [4], []], 2, pad=7).tolist() == [[1, 2], [4, 7], [7, 7]]


def test_encoders_by_hand() -> None:
    letters = Vocabulary(("<pad>", "a", "b", "<unk>", "<bos>", "<eos>"))
    # "ab" is 4 1 2 5, "c" is 4 3 5.
    found = characters(letters, 2)({"snippets": ["ab", "c"]})
    assert found["x"].tolist() == [[4, 1], [2, 0], [4, 3]]
    assert found["y"].tolist() == [[1, 2], [5, -100], [3, 5]]
    found = sentences(letters, 2)({"tokens": ["a b a", "b"], "title": ["", ""]})
    assert found["x"].tolist() == [[4, 1], [4, 2]] and found["y"].tolist() == [[1, 2], [2, 5]]
    found = next_character(letters)({"x": ["ab", "bz"], "y": ["a", "b"]})
    assert found["x"].tolist() == [[1, 2], [2, 3]] and found["y"].tolist() == [1, 2]
    tweet = ["0", "date", "query", "user", "a b a", "tag"]
    found = tweets(letters, 2)({"x": [tweet], "y": np.array([1])})
    assert found["x"].tolist() == [[1, 2]] and found["y"].tolist() == [1]
    for encode in (characters(letters, 2, "x"), next_character(letters), tweets(letters, 2)):
        assert len(encode({"x": np.zeros(0), "y": np.zeros(0)})["x"]) == 0


WRONG = {
    "no text": ({"x": [1], "y": ["a"]}, "column 'x': expected texts; the columns are ['x', 'y']"),
    "no column": ({"y": ["a"]}, "column 'x': expected texts; the columns are ['y']"),
    "lengths": (
        {"x": ["ab", "a"], "y": ["a", "b"]},
        "x: texts of lengths [1, 2]; expected one, an",
    ),
    "two": ({"x": ["ab"], "y": ["ab"]}, "x: texts of lengths [2]; expected one, and y one char"),
}


@pytest.mark.parametrize(("raw", "said"), WRONG.values(), ids=WRONG)
def test_other_columns_are_one_line(tmp_path: Path, raw: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(said)}"):
        next_character(leaf_characters())(raw)
    with pytest.raises(
        InputError, match="^x: expected lists of at least 5 fields, the tweet in 4$"
    ):
        tweets(leaf_characters(), 3)({"x": [["a"]]})
    document = {"users": ["u"], "num_samples": [len(raw["y"])], "user_data": {"u": raw}}
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"^{tmp_path}/a.json, client 'u': {re.escape(said)}"):
        read_leaf(tmp_path / "a.json", next_character(leaf_characters()))


@real("shakespeare_tff")
def test_tff_shakespeare() -> None:
    pytest.importorskip("h5py")
    vocabulary = tff_characters()
    path = DATA / "shakespeare_tff/shakespeare_test.h5"
    data = read_tff(path, characters(vocabulary, 80))
    assert data.num_clients == 715 and data.columns["x"].shape[1:] == (80,)
    x, y = data.columns["x"], data.columns["y"]
    assert int((x == 88).sum()) == 2356 and int((y == 89).sum()) == 2356  # one a snippet
    assert not bool(((x == 0) != (y == -100)).any())
    first = vocabulary.decode(data.client(0)["x"][0].tolist())
    assert first[0] == "<bos>" and set(first[1:]) <= set(vocabulary.tokens)


@real("shakespeare_plays")
def test_leaf_shakespeare() -> None:
    data = read_leaf(DATA / "shakespeare_plays/leaf/test", next_character(leaf_characters()))
    assert (data.num_clients, data.num_examples) == (74, 65_370)
    assert (int(data.sizes.min()), int(data.sizes.max())) == (4, 5617)
    bottom = data.client(data.position("A_MIDSUMMER_NIGHT_S_DREAM_BOTTOM"))
    said = "".join(leaf_characters().decode(bottom["x"][0].tolist()))
    assert (
        said == "tarveling! God's my life, stolen hence, and left me asleep! I have had a most ra"
    )
    assert leaf_characters().decode(bottom["y"][:3].tolist()) == ["r", "e", " "]
    # The window moves by one character: the label is the next window's last.
    assert bottom["y"][:-1].tolist() == bottom["x"][1:, -1].tolist()


@pytest.mark.slow
@real("shakespeare_plays")
def test_leaf_shakespeare_in_full() -> None:
    train, _ = read_leaf_pair(DATA / "shakespeare_plays/leaf", next_character(leaf_characters()))
    assert (train.num_clients, train.num_examples) == (74, 279_102)
    assert (int(train.sizes.min()), int(train.sizes.max())) == (256, 22_708)


@real("sent140_leaf")
def test_sent140() -> None:
    folder = DATA / "sent140_leaf"
    texts = [row[4] for _, raw in leaf_clients(folder) for row in raw["x"]]
    vocabulary = word_vocabulary(texts, 5000)
    data = read_leaf(folder, tweets(vocabulary, 25))
    assert (data.num_clients, data.num_examples) == (2000, 11_275)
    assert (int(data.sizes.min()), int(data.sizes.max())) == (3, 35)
    assert data.columns["x"].shape == (11_275, 25) and data.columns["y"].unique().tolist() == [0, 1]
    words = texts[0].split()[:25]
    ids = data.columns["x"][0].tolist()
    assert ids[: len(words)] == vocabulary.encode(words).tolist() and "@user" in vocabulary.ids
