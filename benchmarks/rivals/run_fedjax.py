"""A contestant: FedJAX, its federated_averaging, or rounds by hand with jax.vmap over the clients.

FedJAX trains one client after the other, each step compiled. The second is what one can write in
an hour for models that it suits: all clients of a round as one compiled function.
"""

from collections.abc import Callable

import fedjax
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.contest import Job, Marks, Workload, arguments, finish, load
from benchmarks.common.contest_jax import forward, from_torch, pixels_last, to_torch

Params = dict[str, jax.Array]
jax.tree_map = jax.tree.map  # FedJAX 0.0.17 calls it by the name that newer versions of jax dropped


def loss(params: Params, batch: dict[str, jax.Array], rng: jax.Array, work: Workload) -> jax.Array:
    """Cross-entropy, the mean over examples and places."""
    log = jax.nn.log_softmax(forward(work, params, batch["x"], rng))
    return -jnp.take_along_axis(log, batch["y"][..., None], -1).mean()


def by_fedjax(job: Job, start: Params) -> Callable[[int, Params], Params]:
    """A round of FedJAX."""
    work = job.work
    grad = jax.grad(lambda params, batch, rng: loss(params, batch, rng, work))
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        grad,
        client_optimizer=fedjax.optimizers.sgd(work.lr),
        server_optimizer=fedjax.optimizers.sgd(1.0),
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(batch_size=work.batch, num_epochs=1),
    )
    sets = [fedjax.ClientDataset({"x": x, "y": y}) for x, y in zip(job.x, job.y, strict=True)]
    state = algorithm.init(start)

    def run(number: int, params: Params) -> Params:
        nonlocal state
        keys = jax.random.split(jax.random.PRNGKey(number), work.clients)
        clients = [(b"%d" % i, data, keys[i]) for i, data in enumerate(sets)]
        state, _ = algorithm.apply(state, clients)
        return state.params

    return run


def by_vmap(job: Job, start: Params) -> Callable[[int, Params], Params]:
    """A round as one compiled function: vmap over the clients, scan over their steps."""
    work = job.work

    def train(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> Params:
        order = jax.random.permutation(key, work.examples).reshape(-1, work.batch)
        keys = jax.random.split(key, len(order))

        def step(params: Params, at: tuple[jax.Array, jax.Array]) -> tuple[Params, None]:
            rows, rng = at
            grads = jax.grad(loss)(params, {"x": x[rows], "y": y[rows]}, rng, work)
            return jax.tree.map(lambda p, g: p - work.lr * g, params, grads), None

        return jax.lax.scan(step, params, (order, keys))[0]

    @jax.jit
    def round(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> Params:
        keys = jax.random.split(key, work.clients)
        trained = jax.vmap(train, in_axes=(None, 0, 0, 0))(params, x, y, keys)
        return jax.tree.map(lambda w: w.mean(0), trained)

    x, y = jnp.asarray(job.x), jnp.asarray(job.y)
    return lambda number, params: round(params, x, y, jax.random.PRNGKey(number))


def main() -> None:
    parser = arguments()
    parser.add_argument("--vmap", action="store_true", help="by hand, without FedJAX")
    args = parser.parse_args()
    job = pixels_last(load(args.job))
    params = from_torch(job.start)
    marks = Marks()
    run = (by_vmap if args.vmap else by_fedjax)(job, params)
    for number in range(args.rounds):
        params = jax.block_until_ready(run(number, params))
        marks.round()
    model = to_torch(job.work.model, {k: np.asarray(v) for k, v in params.items()})
    finish(args.out, marks, model, ("fedjax", "jax", "jaxlib", "numpy"))


if __name__ == "__main__":
    main()
