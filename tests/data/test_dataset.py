"""FederatedDataset: structure, both constructors, access, and every message."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vecfl.data import FederatedDataset
from vecfl.errors import InputError


def small() -> FederatedDataset:
    """Clients of 2, 0 and 3 examples."""
    x = torch.arange(10, dtype=torch.uint8).reshape(5, 2)
    y = torch.tensor([0, 1, 2, 3, 4])
    return FederatedDataset({"x": x, "y": y}, torch.tensor([0, 2, 2, 5]))


def refused(message: str):
    """Expects an InputError whose text is this one line."""
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


# Structure


def test_sizes_and_counts_follow_from_the_offsets():
    dataset = small()
    assert (dataset.num_clients, dataset.num_examples) == (3, 5)
    assert dataset.sizes.tolist() == [2, 0, 3] and dataset.sizes.dtype == torch.int64
    assert dataset.client_ids == range(3)


def test_a_client_is_a_view_of_its_examples():
    dataset = small()
    client = dataset.client(2)
    assert client["x"].tolist() == [[4, 5], [6, 7], [8, 9]] and client["y"].tolist() == [2, 3, 4]
    assert client["x"].dtype == torch.uint8
    client["y"][0] = 7
    assert dataset.columns["y"].tolist() == [0, 1, 7, 3, 4]
    assert dataset.client(1)["x"].shape == (0, 2)


@pytest.mark.parametrize("k", [-1, 3])
def test_a_position_outside_the_clients_is_refused(k):
    with refused(f"client: expected a position in 0..2, got {k}"):
        small().client(k)


def test_examples_are_the_first_and_repeat_in_a_cycle():
    dataset = small()
    assert dataset.examples()["y"].tolist() == [0, 1]
    assert dataset.examples(12)["y"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert dataset.examples(6)["x"][5].tolist() == [0, 1]
    with refused("n: expected an integer >= 1, got 0"):
        dataset.examples(0)


def test_position_inverts_the_ids():
    columns, offsets = small().columns, small().offsets
    dataset = FederatedDataset(columns, offsets, ["ann", 7, ("site", 2)])
    assert [dataset.position(i) for i in ("ann", 7, ("site", 2))] == [0, 1, 2]
    assert small().position(2) == 2
    with refused("client id 'bob': none of the 3 clients has it; the first is 'ann'"):
        dataset.position("bob")


def test_to_moves_the_columns_and_keeps_the_rest():
    columns, offsets = small().columns, small().offsets
    moved = FederatedDataset(columns, offsets, ["a", "b", "c"]).to("meta")
    assert {column.device.type for column in moved.columns.values()} == {"meta"}
    assert moved.offsets.device.type == "cpu" and moved.offsets.tolist() == [0, 2, 2, 5]
    assert moved.client_ids == ["a", "b", "c"] and moved.columns["x"].dtype == torch.uint8


def test_repr_is_one_line():
    assert repr(small()) == (
        "FederatedDataset(3 clients, 5 examples, x: uint8 [2] on cpu, y: int64 [] on cpu, "
        "sizes min 0 median 2 max 3)"
    )


def test_values_are_not_looked_at_when_built_directly():
    x = torch.tensor([float("nan"), float("inf")])
    assert FederatedDataset({"x": x}, torch.tensor([0, 2])).columns["x"] is x


CATEGORIES = "expected n > 0 integers or strings"
TENSOR = "needs a tensor [n, ...], got"
INT64 = "offsets: expected int64 [N + 1] on the CPU, got"
RISE = "offsets: expected to rise from 0 to 5, the number of examples, got"


@pytest.mark.parametrize(
    ("columns", "offsets", "message"),
    [
        ({}, [0, 4], "no columns: expected at least one {name: array [n, ...]}"),
        ({"x": [1, 2]}, [0, 2], f"column 'x': {TENSOR} list"),
        ({"x": torch.tensor(1.0)}, [0, 1], f"column 'x': {TENSOR} float32 [] on cpu"),
        (
            {"x": torch.zeros(4, 2), "y": torch.zeros(3)},
            [0, 4],
            "column 'y' has 3 examples, but column 'x' has 4",
        ),
        ({"x": torch.zeros(0, 2)}, [0, 0, 0], "empty dataset: none of 2 clients has an example"),
        ({"x": torch.zeros(2)}, [0.0, 2.0], f"{INT64} float32 [2] on cpu"),
        ({"x": torch.zeros(2)}, [[0, 2]], f"{INT64} int64 [1, 2] on cpu"),
        ({"x": torch.zeros(2)}, [0], "offsets: no clients; N clients need N + 1 entries, got 1"),
        ({"x": torch.zeros(5)}, [0, 2, 4], f"{RISE} 0 to 4, falling at clients []"),
        ({"x": torch.zeros(5)}, [1, 2, 5], f"{RISE} 1 to 5, falling at clients []"),
        ({"x": torch.zeros(5)}, [0, 4, 2, 5], f"{RISE} 0 to 5, falling at clients [1]"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused(columns, offsets, message):
    with refused(message):
        FederatedDataset(columns, torch.tensor(offsets))


def test_offsets_are_a_tensor_on_the_cpu():
    columns, offsets = small().columns, small().offsets
    with refused(f"{INT64} list"):
        FederatedDataset(columns, offsets.tolist())  # type: ignore[arg-type]
    with refused(f"{INT64} int64 [4] on meta"):
        FederatedDataset(columns, offsets.to("meta"))


def test_ids_are_one_for_each_client_and_distinct():
    columns, offsets = small().columns, small().offsets
    with refused("client_ids: 1 ids for the 3 clients of offsets"):
        FederatedDataset(columns, offsets, ["a"])
    with refused("client_ids: clients 0 and 2 have the same id 'b'; ids must be distinct"):
        FederatedDataset(columns, offsets, ["b", "a", "b"])


# from_clients


def test_from_clients_keeps_order_ids_and_dtypes():
    dataset = FederatedDataset.from_clients(
        {
            "b": {"x": np.array([[1, 2]], dtype=np.uint8), "y": [3]},
            "empty": {"x": [], "y": []},
            "a": {"y": torch.tensor([4, 5]), "x": np.array([[3, 4], [5, 6]], dtype=np.uint8)},
        }
    )
    assert dataset.client_ids == ["b", "empty", "a"]
    assert dataset.offsets.tolist() == [0, 1, 1, 3]
    assert dataset.columns["x"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert dataset.columns["x"].dtype == torch.uint8
    assert dataset.client(2)["y"].tolist() == [4, 5]
    assert dataset.client(1)["x"].shape == (0, 2)


def test_from_clients_numbers_the_clients_of_a_sequence():
    dataset = FederatedDataset.from_clients([{"x": [1.5]}, {"x": [2.5, 3.5]}])
    assert list(dataset.client_ids) == [0, 1]
    assert dataset.client(1)["x"].tolist() == [2.5, 3.5]
    assert dataset.columns["x"].dtype == torch.float32


def test_from_clients_takes_reversed_and_read_only_arrays_and_copies_them():
    reverse = np.arange(4)[::-1]
    fixed = np.arange(4)
    fixed.flags.writeable = False
    tensor = torch.arange(4.0, requires_grad=True)
    dataset = FederatedDataset.from_clients([{"a": reverse, "b": fixed, "c": tensor}])
    assert dataset.columns["a"].tolist() == [3, 2, 1, 0]
    assert dataset.columns["b"].tolist() == [0, 1, 2, 3]
    assert not dataset.columns["c"].requires_grad
    dataset.columns["c"][0] = 9.0
    assert tensor[0] == 0.0


AXIS = "all but the first axis must agree"
LOOSE = "clean it, or build FederatedDataset(columns, offsets), which does not look at values"


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ({}, "no clients: expected {client id: {column: array}}, got none"),
        ([], "no clients: expected {client id: {column: array}}, got none"),
        ({"a": ([1], [2])}, "client 'a': expected {column: array}, got tuple"),
        ({"a": {}}, "client 'a': no columns: expected at least one {name: array [n, ...]}"),
        ({"a": {"x": 3.0}}, f"client 'a': column 'x': {TENSOR} float32 [] on cpu"),
        ([{"x": []}, {"x": []}], "empty dataset: none of 2 clients has an example"),
        (
            {"a": {"x": [1, 2], "y": [2]}},
            "client 'a': column 'y' has 1 examples, but column 'x' has 2",
        ),
        (
            {"a": {"x": [1], "y": [2]}, "b": {"x": [1]}},
            "client 'b': columns ['x'], but client 'a' has ['x', 'y']; names must agree",
        ),
        (
            [{"x": torch.zeros(1, 3)}, {"x": torch.zeros(2, 4)}],
            "client 1, column 'x': float32 [2, 4] on cpu, "
            f"but client 0 has float32 [1, 3] on cpu; {AXIS}",
        ),
        (
            [{"x": [1]}, {"x": [1.0]}],
            f"client 1, column 'x': float32 [1] on cpu, but client 0 has int64 [1] on cpu; {AXIS}",
        ),
        (
            [{"x": torch.zeros(1)}, {"x": torch.zeros(1, device="meta")}],
            "client 1, column 'x': float32 [1] on meta, "
            f"but client 0 has float32 [1] on cpu; {AXIS}",
        ),
        (
            {"a": {"x": [1.0], "z": [2.0]}, "b": {"x": [1.0, 2.0], "z": [3.0, float("inf")]}},
            f"column 'z', client 'b', example 1: NaN or Inf; {LOOSE}",
        ),
    ],
)
def test_clients_that_do_not_fit_are_refused(clients, message):
    with refused(message):
        FederatedDataset.from_clients(clients)


@pytest.mark.parametrize("value", [["a", "b"], [[1], [2, 3]], None, np.array(["a", "b"])])
def test_what_is_no_array_of_numbers_is_refused(value):
    with pytest.raises(
        InputError, match=r"^client 'c', column 'x': expected an array of numbers: "
    ):
        FederatedDataset.from_clients({"c": {"x": value}})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_named(bad, dtype):
    x = torch.zeros(6, 2, 2, dtype=dtype)
    x[3, 1, 0] = bad
    # Client 1 is empty, and client 2 owns the rows 3, 4, 5.
    message = r"^column 'x', client 2, example 0: NaN or Inf; clean it, or build FederatedDataset"
    with pytest.raises(InputError, match=message):
        FederatedDataset.from_arrays({"x": x}, [0, 0, 0, 2, 2, 2], num_clients=4)


def test_the_largest_finite_values_pass():
    x = torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).min])
    assert FederatedDataset.from_clients([{"x": x}]).columns["x"].tolist() == x.tolist()


def test_a_column_without_numbers_passes():
    dataset = FederatedDataset.from_clients([{"x": torch.zeros(2, 0), "y": [1, 2]}])
    assert dataset.columns["x"].shape == (2, 0)


# from_arrays


def test_from_arrays_groups_by_sorted_id_and_keeps_the_order_within_a_client():
    dataset = FederatedDataset.from_arrays(
        {"x": np.array([10, 11, 12, 13], dtype=np.uint8)}, ["b", "a", "b", "a"]
    )
    assert dataset.client_ids == ["a", "b"] and isinstance(dataset.client_ids[0], str)
    assert dataset.client(0)["x"].tolist() == [11, 13]
    assert dataset.client(1)["x"].tolist() == [10, 12]
    assert dataset.columns["x"].dtype == torch.uint8


def test_from_arrays_keeps_the_integer_ids_that_occur():
    dataset = FederatedDataset.from_arrays({"x": [1, 2, 3]}, torch.tensor([30, -4, 30]))
    assert dataset.client_ids == [-4, 30]
    assert dataset.sizes.tolist() == [1, 2] and dataset.position(30) == 1


def test_from_arrays_takes_an_object_array_of_strings():
    dataset = FederatedDataset.from_arrays({"x": [1, 2]}, np.array(["b", "a"], dtype=object))
    assert dataset.client_ids == ["a", "b"]


def test_num_clients_allows_empty_clients():
    dataset = FederatedDataset.from_arrays({"x": [1, 2, 3]}, [3, 1, 3], num_clients=5)
    assert dataset.client_ids == range(5)
    assert dataset.sizes.tolist() == [0, 1, 0, 2, 0]
    assert dataset.client(3)["x"].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("client", "num_clients", "message"),
    [
        ([0, 0, 1], None, "client: 3 entries, but column 'x' has 2 examples"),
        ([0, 2], 2, "client: example 1 is given to client 2, expected 0..1 (num_clients=2)"),
        ([-1, 0], 2, "client: example 0 is given to client -1, expected 0..1 (num_clients=2)"),
        (["a", "b"], 2, "client: num_clients needs integers, got <U1"),
        ([0, 1], 0, "num_clients: expected an integer >= 1, got 0"),
        ([0.0, 1.0], None, f"client: {CATEGORIES}, got shape [2] of float64"),
        ([[0], [1]], None, f"client: {CATEGORIES}, got shape [2, 1] of int64"),
    ],
)
def test_a_client_of_each_example_that_does_not_fit_is_refused(client, num_clients, message):
    with refused(message):
        FederatedDataset.from_arrays({"x": [1, 2]}, client, num_clients)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": [1, 2], "y": [1]}, "column 'y' has 1 examples, but column 'x' has 2"),
        ({}, "no columns: expected at least one {name: array [n, ...]}"),
        ({"x": []}, "empty dataset: no examples in columns ['x']"),
        ({"x": 1}, f"column 'x': {TENSOR} int64 [] on cpu"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, message):
    with refused(message):
        FederatedDataset.from_arrays(arrays, [0, 0])


# Round trips


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
@settings(deadline=None)
def test_pooled_data_survives_the_way_to_clients_and_back(client):
    n = len(client)
    arrays = {"row": np.arange(n), "x": np.arange(2.0 * n).reshape(n, 2)}
    dataset = FederatedDataset.from_arrays(arrays, client, num_clients=7)
    for k in range(7):
        rows = [i for i, owner in enumerate(client) if owner == k]
        part = dataset.client(k)
        assert part["row"].tolist() == rows
        assert part["x"].tolist() == arrays["x"][rows].tolist()

    parts: dict[int, dict[str, Tensor]] = {k: dataset.client(k) for k in range(7)}
    again = FederatedDataset.from_clients(parts)
    assert again.offsets.tolist() == dataset.offsets.tolist()
    for name, column in dataset.columns.items():
        assert torch.equal(again.columns[name], column)


def test_a_hundred_thousand_clients():
    owner = np.arange(60_000) * 5 % 100_000  # every fifth client: 20,000 of them, 3 examples each
    dataset = FederatedDataset.from_arrays({"row": np.arange(60_000)}, owner, num_clients=100_000)
    assert dataset.num_clients == 100_000
    assert torch.bincount(dataset.sizes).tolist() == [80_000, 0, 0, 20_000]
    assert dataset.client(99_995)["row"].tolist() == [19_999, 39_999, 59_999]
    assert dataset.position(99_995) == 99_995
