"""Server optimizers: how the model moves by the aggregated pseudo-gradient, in float64.

The pseudo-gradient `update` is the weighted mean of w - w_k, so a server steps against it, as an
optimizer steps against a gradient.
"""

from vecfl.server_optim.adam import server_adam, server_adamax, server_adamw
from vecfl.server_optim.around import clipped, scheduled
from vecfl.server_optim.base import ServerOptimizer, norm
from vecfl.server_optim.fedopt import adaptive, fedopt_adagrad, fedopt_adam, fedopt_yogi
from vecfl.server_optim.layerwise import server_lamb, server_lars
from vecfl.server_optim.plain import server_momentum, server_sgd

__all__ = [
    "ServerOptimizer",
    "adaptive",
    "clipped",
    "fedopt_adagrad",
    "fedopt_adam",
    "fedopt_yogi",
    "norm",
    "scheduled",
    "server_adam",
    "server_adamax",
    "server_adamw",
    "server_lamb",
    "server_lars",
    "server_momentum",
    "server_sgd",
]
