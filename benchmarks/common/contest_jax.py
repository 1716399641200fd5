"""The models of the contest in JAX: functions of the parameters, pixels last as XLA likes it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.common.contest import HIDDEN, SHAPES, Arrays, Job, Workload

Params = dict[str, Array]


def pixels_last(job: Job) -> Job:
    """The job with images [..., height, width, channels], and labels as JAX counts (int32)."""
    y = job.y.astype(np.int32)
    if job.x.ndim == 5:
        return replace(job, x=np.ascontiguousarray(job.x.transpose(0, 1, 3, 4, 2)), y=y)
    return replace(job, x=job.x if job.work.model != "lstm" else job.x.astype(np.int32), y=y)


def from_torch(start: Arrays) -> Params:
    """Linear weights [in, out], kernels [height, width, in, out], features in the order of x."""
    return {name: jnp.asarray(turned(name, value)) for name, value in start.items()}


def turned(name: str, w: np.ndarray) -> np.ndarray:
    if "bias" in name or "embedding" in name:
        return w
    if w.ndim == 4:
        return w.transpose(2, 3, 1, 0)
    if name == "hidden.weight":  # what it sees is [channels, side, side] in PyTorch
        side = int((w.shape[1] // 64) ** 0.5)
        w = w.reshape(-1, 64, side, side).transpose(0, 2, 3, 1).reshape(w.shape)
    return w.T


def to_torch(model: str, params: Arrays) -> Arrays:
    """The inverse of `from_torch`."""

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        # Where each number of PyTorch's array went, as `turned` says.
        places = turned(name, np.arange(np.prod(shape)).reshape(shape))
        back = np.empty(shape, np.float32)
        back.ravel()[places.ravel()] = params[name].ravel()
        return back

    return {name: one(name, shape) for name, shape in SHAPES[model].items()}


def dropout(x: Array, p: float, rng: Array, work: Workload) -> Array:
    if not work.dropout:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - p, x.shape), x / (1 - p), 0)


def linear(params: Params, name: str, x: Array) -> Array:
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def convolution(params: Params, name: str, x: Array) -> Array:
    kernel, layout = params[f"{name}.weight"], ("NHWC", "HWIO", "NHWC")
    out = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)
    return out + params[f"{name}.bias"]


def lstm(params: Params, layer: int, x: Array) -> Array:
    """Outputs [B, T, hidden] of one layer; the product with the inputs is one for all places."""
    w, u = params[f"lstm.weight_ih_l{layer}"], params[f"lstm.weight_hh_l{layer}"]
    inputs = x @ w + (params[f"lstm.bias_ih_l{layer}"] + params[f"lstm.bias_hh_l{layer}"])

    def step(state: tuple[Array, Array], now: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = state
        i, f, g, o = jnp.split(now + h @ u, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((x.shape[0], HIDDEN))
    return lax.scan(step, (zero, zero), inputs.swapaxes(0, 1))[1].swapaxes(0, 1)


def forward(work: Workload, params: Params, x: Array, rng: Array) -> Array:
    """Logits [B, ..., classes] in training mode."""
    if work.model == "logistic":
        return linear(params, "logits", x)
    if work.model == "lstm":
        x = params["embedding.weight"][x]
        return linear(params, "logits", lstm(params, 1, lstm(params, 0, x)))
    first, second = jax.random.split(rng)
    x = jax.nn.relu(convolution(params, "conv1", x))
    x = jax.nn.relu(convolution(params, "conv2", x))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = dropout(x, 0.25, first, work).reshape(len(x), -1)
    x = dropout(jax.nn.relu(linear(params, "hidden", x)), 0.5, second, work)
    return linear(params, "logits", x)
