"""Pages: which ranges of a file the system is asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vecfl.data import FederatedDataset, dataset, open_dataset, save
from vecfl.data.pages import PAGE, pages, read_ahead


def asked(*parts: tuple[int, int]) -> list[list[int]]:
    """The ranges for parts of a file, in pages."""
    starts, ends = np.array(parts, np.int64).reshape(-1, 2).T
    return (pages(starts, ends) // PAGE).tolist()


def test_ranges_by_hand() -> None:
    assert asked((0, 1)) == [[0, 1]]
    assert asked((PAGE - 1, PAGE)) == [[0, 1]]
    assert asked((PAGE - 1, PAGE + 1)) == [[0, 2]]
    assert asked((5 * PAGE, 6 * PAGE)) == [[5, 6]]
    # Neighbours are asked for together, in any order; page 3 lies between and is not needed.
    assert asked((4 * PAGE, 4 * PAGE + 9), (PAGE, 2 * PAGE), (0, 3), (2 * PAGE, 2 * PAGE + 1)) == [
        [0, 3],
        [4, 5],
    ]
    # A short range inside a long one does not cut it.
    assert asked((0, 9 * PAGE), (PAGE, PAGE + 1), (8 * PAGE, 8 * PAGE + 1)) == [[0, 9]]
    assert asked((7, 7), (PAGE, PAGE)) == asked() == []  # clients without examples


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=12))
def test_ranges_are_exactly_the_pages_that_are_touched(parts: list[tuple[int, int]]) -> None:
    quarter = PAGE // 4
    bytes_ = [(start * quarter, (start + length) * quarter) for start, length in parts]
    touched = {page for a, b in bytes_ for page in range(a // PAGE, -(-b // PAGE)) if b > a}
    ranges = asked(*bytes_)
    listed = [page for a, b in ranges for page in range(a, b)]
    assert listed == sorted(touched)
    assert all(a[1] < b[0] for a, b in zip(ranges, ranges[1:], strict=False))


def test_a_prefetch_asks_for_the_bytes_of_its_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Clients of 2, 0 and 3 examples; x takes 3 bytes each and y 8. A header of .npy has 128 bytes.
    columns = {"x": torch.zeros(5, 3, dtype=torch.uint8), "y": torch.arange(5)}
    save(FederatedDataset(columns, torch.tensor([0, 2, 2, 5])), tmp_path / "s")
    calls = []
    monkeypatch.setattr(
        dataset, "read_ahead", lambda path, a, b: calls.append((path.name, a.tolist(), b.tolist()))
    )
    data = open_dataset(tmp_path / "s").to("cpu")
    data.prefetch(torch.tensor([2, 1, 0]))
    assert calls == [
        ("column_0.npy", [128 + 6, 128 + 6, 128], [128 + 15, 128 + 6, 128 + 6]),
        ("column_1.npy", [128 + 16, 128 + 16, 128], [128 + 40, 128 + 16, 128 + 16]),
    ]
    whole = np.load(tmp_path / "s" / "column_1.npy")
    assert (tmp_path / "s" / "column_1.npy").read_bytes()[128 + 16 :] == whole[2:].tobytes()


def test_data_in_memory_have_nothing_to_prefetch() -> None:
    data = FederatedDataset({"y": torch.arange(5)}, torch.tensor([0, 5]))
    assert data.files == {}
    data.prefetch(torch.tensor([0]))


def test_it_is_a_hint(tmp_path: Path) -> None:
    read_ahead(tmp_path / "absent", np.array([0]), np.array([10]))
