"""Classes of 28 x 28 images: MNIST by its true writers, or --data of any format.

    python recipes/mnist_writers.py --algorithm fedadam --model cnn
    python recipes/mnist_writers.py --data leaf/femnist/data --test-clients 0.1

By default 539 writers are the clients, and 297 writers whom nobody has seen test. Other data may
be whatever `vecfl.data.read` understands, stores among them. Papers: McMahan et al. 2017,
arXiv:1602.05629 (fedavg, fedsgd); Li et al. 2020, arXiv:1812.06127 (fedprox); Hsu et al. 2019,
arXiv:1909.06335 (fedavgm); Reddi et al. 2021, arXiv:2003.00295.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import vecfl
from vecfl.algorithm_flags import AlgorithmArgs, check_algorithm, make_algorithm, settle
from vecfl.cli import check, main
from vecfl.data import FederatedDataset, hold_out, mnist_writers, read
from vecfl.data.mnist_writers import default_folder
from vecfl.evaluations import held_out, validated
from vecfl.flags import check_run, simulation
from vecfl.models import emnist_cnn, logistic, small_cnn
from vecfl.named import named_model
from vecfl.plugins import Known, part
from vecfl.record import record_run
from vecfl.resume import resume

TEST_CLIENTS = 0.2
MODELS = {"logistic": logistic, "cnn": emnist_cnn, "small_cnn": small_cnn}
AUGMENT: Known = {"crop": vecfl.crop, "flip": vecfl.flip, "normalise": vecfl.normalise}
MOST_CLASSES = 10_000  # more are no classes but, say, ids
log = logging.getLogger("vecfl")


@dataclass
class Args(AlgorithmArgs):
    """Images of 28 x 28, MNIST by its writers or others; who is held out or unseen tests."""

    data: str | None = None
    """data of any format, or a store; MNIST's and QMNIST's files in $VECFL_DATA/mnist_writers if
    not given"""
    client: str | None = None
    """column of the client, in CSV, NPZ and parquet"""
    label: str | None = None
    """column of the label, in CSV and parquet"""
    test_clients: float | None = None
    """share of the clients that test, where --data has no test part; 0.2 if not given"""
    data_seed: int | None = None
    """seed of the choice of these clients; --seed if not given"""
    server_clients: float | None = None
    """share of the training clients whose examples the server has instead, for a replay around
    the algorithm; drawn like those that test"""
    augment: tuple[str, ...] = ()
    """of the images in training, in this order: crop(2), flip(), normalise([0.13], [0.31]),
    file.py:name"""
    model: str = "logistic"
    """logistic; cnn, that of Reddi et al. for EMNIST; small_cnn, of 14,410 parameters for 10
    classes; or file.py:name, a function of the classes"""


def run(args: Args) -> None:
    args = settle(args)
    check_args(args)
    train, test, args = load(args)
    tell_paper(train)
    parts, number = unseen(train, test), classes(train, test)
    data_seed = args.seed if args.data_seed is None else args.data_seed
    train, own = of_server(args, train, data_seed)
    train, validation = held_out(args, train, data_seed, clients="unseen_examples" not in parts)
    args, before = resume(args, "mnist_writers")
    sim = make_simulation(args, train, number, own)

    def test_all(state: vecfl.State) -> dict[str, float | int | str]:
        return evaluate(sim, state, test, parts) | sim.evaluate_clients(state, test)

    record_run(
        sim,
        validated(sim, args, validation, test_all),
        args,
        recipe="mnist_writers",
        before=before,
    )


def check_args(args: Args) -> None:
    """Raise InputError, with the name of the flag, before anything is made."""
    of_data = ("client", "label", "test_clients", "data_seed")
    check(args, of_data, lambda _: args.data is not None, "none without --data")
    check(args, ("test_clients",), lambda x: 0 < x < 1, "a share between 0 and 1")
    check(args, ("data_seed",), lambda n: 0 <= n < 2**63, "0 to 2^63 - 1")
    check(args, ("server_clients",), lambda x: 0 < x < 1, "a share between 0 and 1")
    replays = any(text.strip().startswith("replay(") for text in args.around)
    check(args, ("server_clients",), lambda _: replays, "--around 'replay(...)' beside it")
    check_algorithm(args)
    check_run(args)


def load(args: Args) -> tuple[FederatedDataset, FederatedDataset, Args]:
    """Training and test data, and `args` with the share and the seed that were used."""
    if args.data is None:
        return *mnist_writers(default_folder()), args
    given = {name: getattr(args, name) for name in ("client", "label")}
    options = {name: value for name, value in given.items() if value is not None}
    train, test = read(Path(args.data).expanduser(), **options)
    largest = checked_images(train, args.data)
    if test is not None:
        has = f"none: {args.data} has test data of its own"
        check(args, ("test_clients", "data_seed"), lambda _: False, has)
        largest = max(largest, checked_images(test, f"{args.data}, test data"))
        return images(train, largest), images(test, largest), args
    train = images(train, largest)
    share = TEST_CLIENTS if args.test_clients is None else args.test_clients
    seed = args.seed if args.data_seed is None else args.data_seed
    try:
        split = hold_out(train, seed, clients=share)
    except vecfl.InputError as error:
        raise vecfl.InputError(f"--test-clients: {args.data}: {error}") from error
    assert split.test_clients is not None
    return split.train, split.test_clients, replace(args, test_clients=share, data_seed=seed)


def checked_images(data: FederatedDataset, source: str) -> float:
    """The largest pixel of images x of 28 x 28 with classes y [n].

    Raises InputError where the data are something else.
    """
    if not {"x", "y"} <= set(data.columns):
        raise vecfl.InputError(
            f"{source}: columns {list(data.columns)}; expected x, images of 28 x 28, and y, their "
            "labels"
        )
    x, y = data.columns["x"], data.columns["y"]
    if tuple(x.shape[1:]) not in {(1, 28, 28), (28, 28), (784,)}:
        raise vecfl.InputError(
            f"{source}: column 'x' is {list(x.shape)}; expected images [n, 1, 28, 28], "
            "[n, 28, 28] or [n, 784]"
        )
    if y.dim() != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise vecfl.InputError(
            f"{source}: column 'y' is {y.dtype} {list(y.shape)}; expected an integer for each image"
        )
    if not 0 <= int(y.min()) <= int(y.max()) < MOST_CLASSES:
        raise vecfl.InputError(
            f"{source}: labels from {int(y.min())} to {int(y.max())}; expected classes, counted "
            f"from 0, fewer than {MOST_CLASSES:,}"
        )
    low, high = (float(bound) for bound in x.aminmax())
    whole = not x.is_floating_point() or not bool((x % 1).any())
    if low < 0 or high > (255 if whole else 1):
        raise vecfl.InputError(
            f"{source}: column 'x' has values from {low:g} to {high:g}; expected 0 to 1, or whole "
            "numbers from 0 to 255"
        )
    return high


def images(data: FederatedDataset, largest: float) -> FederatedDataset:
    """The data with x [n, 1, 28, 28]: uint8 if the largest pixel of all is above 1, else floats."""
    x = data.columns["x"]
    pixels = x.to(torch.uint8) if largest > 1 else x if x.is_floating_point() else x.float()
    columns = {"x": pixels.view(-1, 1, 28, 28), "y": data.columns["y"]}
    same = ("x", "y") if pixels.dtype == x.dtype else ("y",)  # what a store has on disk
    files = {name: data.files[name] for name in same if name in data.files}
    return FederatedDataset.from_checked(
        columns, data.offsets, data.client_ids, files, data.lengths
    )


def classes(train: FederatedDataset, test: FederatedDataset) -> int:
    """How many there are, by the largest label; those that never occur are told."""
    seen = torch.cat([part.columns["y"] for part in (train, test)]).long().bincount()
    absent = (seen == 0).nonzero().flatten().tolist()
    if absent:
        log.warning("%d classes, of which %s never occur", len(seen), str(absent[:5]).strip("[]"))
    return len(seen)


def tell_paper(train: FederatedDataset) -> None:
    """A warning where pixels are mostly 1: with white paper the default learning rate diverges."""
    x = train.columns["x"][:1000]
    if float(x.double().mean()) > (127 if x.dtype == torch.uint8 else 0.5):
        log.warning("white paper (pixels are mostly 1): logistic regression wants --lr 0.03")


def of_server(
    args: Args, train: FederatedDataset, seed: int
) -> tuple[FederatedDataset, dict[str, Tensor] | None]:
    """The clients that are left, and the columns of those whose examples the server has."""
    if args.server_clients is None:
        return train, None
    try:
        split = hold_out(train, seed, clients=args.server_clients)
    except vecfl.InputError as error:
        raise vecfl.InputError(f"--server-clients: {error}") from error
    assert split.test_clients is not None
    return split.train, dict(split.test_clients.columns)


def unseen(train: FederatedDataset, test: FederatedDataset) -> dict[str, dict[str, Tensor]]:
    """The test data of clients that do not train, and of those that do, where there are any."""
    known = set(train.client_ids)
    seen = torch.tensor([id_ in known for id_ in test.client_ids]).repeat_interleave(test.sizes)
    rows = {"unseen_clients": ~seen, "unseen_examples": seen}
    return {
        name: {column: values[some] for column, values in test.columns.items()}
        for name, some in rows.items()
        if some.any()
    }


def evaluate(
    sim: vecfl.Simulation,
    state: vecfl.State,
    test: FederatedDataset,
    parts: dict[str, dict[str, Tensor]],
) -> dict[str, float | int | str]:
    """The metrics of each part under its name, and of all test data as `eval/...`."""
    found = [sim.evaluate(state, columns, name) for name, columns in parts.items()]
    if len(found) > 1:
        found.append(sim.evaluate(state, test.columns))
    else:  # the same examples
        found += [{f"eval/{key.partition('/')[2]}": value for key, value in found[0].items()}]
    return {key: value for metrics in reversed(found) for key, value in metrics.items()}


def make_simulation(
    args: Args, data: FederatedDataset, classes: int, own: dict[str, Tensor] | None
) -> vecfl.Simulation:
    torch.manual_seed(args.seed)
    module = named_model(args.model, MODELS, classes)
    metrics = {"accuracy": vecfl.accuracy}
    augment = [part("--augment", text, AUGMENT) for text in args.augment]
    task = vecfl.Task(
        module, vecfl.cross_entropy, metrics, example=data.examples(2), augment=augment
    )
    return simulation(args, task, data, make_algorithm(args), own=own)


if __name__ == "__main__":
    main(run, Args)
