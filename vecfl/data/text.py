"""Text as ids: vocabularies, windows for next-token prediction, and `encode=` for readers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vecfl.data.partition import integer
from vecfl.data.stream import Encode
from vecfl.errors import InputError

Ids = NDArray[np.int64]
IGNORED = -100  # a label that no loss counts, as torch's cross_entropy has it
PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"

# Tokens have the ids of TensorFlow Federated: its order of characters, from 1 on.
TFF_CHARACTERS = (
    "dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"
)
# LEAF's order, from 0 on.
LEAF_CHARACTERS = (
    "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id: the token at place i has id i. <pad>, <unk>, <bos> and <eos> are special.

    Raises InputError for a token that occurs twice.
    """

    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.tokens):
            twice = Counter(self.tokens).most_common(1)[0][0]
            raise InputError(f"vocabulary: token {twice!r} occurs twice; tokens must be distinct")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ids(self) -> Mapping[str, int]:
        return {token: id_ for id_, token in enumerate(self.tokens)}

    def encode(self, tokens: Iterable[str]) -> Ids:
        """The ids of tokens, or of the characters of a string, int64 [n].

        Unknown ones become <unk>; InputError where the vocabulary has none.
        """
        tokens = list(tokens)
        unk = self.ids.get(UNK, -1)
        ids = np.fromiter((self.ids.get(token, unk) for token in tokens), np.int64, len(tokens))
        if unk < 0 and len(unknown := np.flatnonzero(ids < 0)):
            raise InputError(f"token {tokens[unknown[0]]!r} is not in the vocabulary, nor is <unk>")
        return ids

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The tokens of ids."""
        return [self.tokens[id_] for id_ in ids]

    def special(self, token: str) -> int:
        """The id of a special token; InputError where the vocabulary lacks it."""
        if token not in self.ids:
            raise InputError(f"vocabulary: no {token} among its {len(self)} tokens")
        return self.ids[token]


def tff_characters() -> Vocabulary:
    """TFF Shakespeare's 90 ids: <pad> 0, 86 characters, <unk> 87, <bos> 88, <eos> 89.

    Source: Reddi et al. 2021, arXiv:2003.00295, and its code.
    """
    return Vocabulary((PAD, *TFF_CHARACTERS, UNK, BOS, EOS))


def leaf_characters() -> Vocabulary:
    """LEAF Shakespeare's 80 characters, ids 0..79, and <unk> 80."""
    return Vocabulary((*LEAF_CHARACTERS, UNK))


def word_vocabulary(texts: Iterable[str], words: int) -> Vocabulary:
    """<pad> 0, then the most frequent `words` of texts split at blanks, then <unk>, <bos>, <eos>.

    Equally frequent words are in alphabetical order. This is TFF's order of ids.
    """
    counts = Counter(word for text in texts for word in text.split())
    for token in (PAD, UNK, BOS, EOS):
        counts.pop(token, None)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return Vocabulary((PAD, *ranked[: integer(words, "words", 1)], UNK, BOS, EOS))


def windows(
    ids: Sequence[int] | Ids, length: int, stride: int | None = None, pad: int = 0
) -> tuple[Ids, Ids]:
    """Windows of a sequence: x [n, length] and the next tokens y [n, length], int64.

    Window i begins at i * stride (`length` unless given); the last is the first that reaches the
    end. Where the sequence has ended, x is `pad` and y is -100, which no loss counts. Fewer than
    two ids give no window. Raises InputError for length < 1 and for a stride not in 1..length.
    """
    length = integer(length, "length", 1)
    stride = length if stride is None else integer(stride, "stride", 1)
    if stride > length:
        raise InputError(f"stride: expected 1..{length}, the length, got {stride}; tokens are lost")
    ids = np.asarray(ids, np.int64)
    n = 0 if len(ids) < 2 else 1 + max(0, -(-(len(ids) - 1 - length) // stride))
    at = np.arange(n)[:, None] * stride + np.arange(length)
    there = at + 1 < len(ids)
    x = np.where(there, ids[np.minimum(at, len(ids) - 1)], pad) if n else at
    y = np.where(there, ids[np.minimum(at + 1, len(ids) - 1)], IGNORED) if n else at
    return x, y


def padded(sequences: Sequence[Sequence[int] | Ids], length: int, pad: int = 0) -> Ids:
    """Ragged sequences as int64 [n, length]: `pad` behind short ones, long ones cut at the end."""
    rows = np.full((len(sequences), integer(length, "length", 1)), pad, np.int64)
    for row, ids in zip(rows, sequences, strict=True):
        row[: len(ids)] = ids[:length]
    return rows


def characters(vocabulary: Vocabulary, length: int, column: str = "snippets") -> Encode:
    """Encodes texts for next-character prediction: x, y [n, length].

    Each text is <bos>, its characters, <eos>, in windows that follow one another, the last padded.
    """
    return _prediction(vocabulary, length, column, str, None)


def sentences(vocabulary: Vocabulary, length: int, column: str = "tokens") -> Encode:
    """Encodes sentences for next-word prediction: x, y [n, length], one row a sentence.

    Each is <bos>, its words, <eos>, padded, or cut at the end to its first `length` predictions.
    """
    return _prediction(vocabulary, length, column, str.split, length + 1)


def next_character(vocabulary: Vocabulary) -> Encode:
    """Encodes LEAF's Shakespeare: x [n, 80], the characters, and y [n], the one that follows.

    Raises InputError where texts are not of one length or y is not one character.
    """

    def encode(raw: Mapping[str, Any]) -> Mapping[str, Any]:
        x, y = _texts(raw, "x"), _texts(raw, "y")
        widths = sorted({len(text) for text in x})
        if len(widths) > 1 or any(len(text) != 1 for text in y):
            raise InputError(f"x: texts of lengths {widths[:3]}; expected one, and y one character")
        ids = vocabulary.encode("".join(x))
        return {"x": ids.reshape(len(x), -1) if x else ids, "y": vocabulary.encode("".join(y))}

    return encode


def tweets(vocabulary: Vocabulary, length: int, field: int = 4) -> Encode:
    """Encodes LEAF's Sent140: x [n, length], the words of the tweet, and y [n], its label.

    `field` is the tweet's place among the fields. Short ones are padded, long ones cut at the end.
    """

    def encode(raw: Mapping[str, Any]) -> Mapping[str, Any]:
        rows = raw.get("x")
        if isinstance(rows, list) and all(isinstance(r, list) and len(r) > field for r in rows):
            texts = _texts({"x": [row[field] for row in rows]}, "x")
            ids = [vocabulary.encode(text.split()) for text in texts]
            return {**raw, "x": padded(ids, length, vocabulary.special(PAD))}
        if rows is not None and len(rows) == 0:
            return raw
        raise InputError(f"x: expected lists of at least {field + 1} fields, the tweet in {field}")

    return encode


def _prediction(
    vocabulary: Vocabulary, length: int, column: str, split: Any, limit: int | None
) -> Encode:
    pad, bos, eos = (vocabulary.special(token) for token in (PAD, BOS, EOS))
    integer(length, "length", 1)

    def encode(raw: Mapping[str, Any]) -> Mapping[str, Any]:
        parts = []
        for text in _texts(raw, column):
            ids = np.concatenate([[bos], vocabulary.encode(split(text)), [eos]])
            parts.append(windows(ids[:limit], length, pad=pad))
        if not parts:
            return {"x": np.zeros((0, length), np.int64), "y": np.zeros((0, length), np.int64)}
        return {
            name: np.concatenate(part)
            for name, part in zip("xy", zip(*parts, strict=True), strict=True)
        }

    return encode


def _texts(raw: Mapping[str, Any], column: str) -> list[str]:
    """A column of texts; a client without examples has an empty one of any kind."""
    values = raw.get(column)
    if values is not None and len(values) == 0:
        return []
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise InputError(f"column {column!r}: expected texts; the columns are {list(raw)}")
    return values
