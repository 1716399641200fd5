"""What clients send and how much it counts, worked out on paper: DGA, clipped messages, freezing.

w starts at 1, as in `hand`.
"""

import math

from .loop import Setting
from .tiny import FAR, PLAIN, SETTLED, STEEP, Case, Offset, client

# lr = 1/4: FAR (loss 1/2) goes to 1.25, STEEP (2) to 0, SETTLED (0) stays. With beta = 2 ln 2 they
# count 2^-1, 2^-4 and 1, whatever their number of examples: (1.25/2 + 0 + 1) / (1/2 + 1/16 + 1)
# = 1.625 / 1.5625. Losses (1/2 + 3 * 2 + 0) / 5.
LOSS = Case(
    "dga, three unequal losses",
    [client(FAR), client(STEEP, STEEP, STEEP), client(SETTLED)],
    Setting(rounds=1, lr=0.25, weighting="loss", softmax_beta=2 * math.log(2)),
    [{"w": 1.04}],
    [1.3],
)

# PLAIN three times, lr = 1/2, batches of 2: mean losses 1/2 at w = 1 and 1/8 at w = 1/2, together
# 5/8, over 3 examples 5/24; w = 1/4. It counts 1/2, SETTLED 1: (1/8 + 1) / 1.5. Its mean loss by
# examples is (2 * 1/2 + 1/8) / 3 = 3/8. Losses (9/8 + 0) / 4.
FLUTE = Case(
    "dga, mean losses of batches",
    [client(PLAIN, PLAIN, PLAIN), client(SETTLED)],
    Setting(rounds=1, lr=0.5, batch=2, weighting="flute_loss", softmax_beta=4.8 * math.log(2)),
    [{"w": 0.75}],
    [0.28125],
)

# Two steps, lr = 1/4. FAR: gradients -1 and -3/4, w = 1.4375, variance 1/64. STEEP: 4 and 0,
# w = 0, variance 4. With beta = ln 2 / 4 they count 2^(-1/256) and 1/2. Losses 1/2 + 9/32 + 2,
# over 4.
VARIANCE = Case(
    "dga, variance over steps",
    [client(FAR), client(STEEP)],
    Setting(rounds=1, lr=0.25, epochs=2, weighting="variance", softmax_beta=math.log(2) / 4),
    [{"w": 1.4375 * 2 ** (-1 / 256) / (2 ** (-1 / 256) + 0.5)}],
    [2.78125 / 4],
)

# FAR's mean gradient is -1, its weight exp(10) is cut to 100; SETTLED counts 1.
CAP = Case(
    "dga, the cap",
    [client(FAR), client(SETTLED)],
    Setting(rounds=1, lr=0.25, weighting="mean", softmax_beta=10.0),
    [{"w": 126 / 101}],
    [0.25],
)

# STEEP's gradient 4 is clipped to 2, w = 1/2, and that is its RMS; FAR's is 1. They count 1/4 and
# 1/2: (1/8 + 5/8) / (3/4).
RMS = Case(
    "dga, rms after clipping",
    [client(FAR), client(STEEP)],
    Setting(rounds=1, lr=0.25, clip=2.0, weighting="rms", softmax_beta=math.log(2)),
    [{"w": 1.0}],
    [1.25],
)

# w - w_k: -1/4 of FAR, which counts 2^(1/4), and 1 of STEEP, which counts 1/2.
UPDATE = Case(
    "dga, mean of the update",
    [client(FAR), client(STEEP)],
    Setting(rounds=1, lr=0.25, weighting="update_mean", softmax_beta=math.log(2)),
    [{"w": 1.25 * 2**0.25 / (2**0.25 + 0.5)}],
    [1.25],
)

# FAR counts 1, STEEP 1, nobody 0 (by uniform weights of FedAvg it would be 1: 1.25 + 0 + 1 by 3).
UNIFORM = Case(
    "dga, uniform",
    [client(FAR), client(STEEP, STEEP, STEEP), client()],
    Setting(rounds=1, lr=0.25, weighting="uniform"),
    [{"w": 0.625}],
    [1.625],
)

# FAR sends -1/4, STEEP 1, cut to 1/2: (1.25 + 3 * 0.5) / 4.
CLIPPED = Case(
    "clipped messages",
    [client(FAR), client(STEEP, STEEP, STEEP)],
    Setting(rounds=1, lr=0.25, clips=(("norm", 0.5),)),
    [{"w": 0.6875}],
    [1.625],
)

# y = w x + 1 on PLAIN: g = 2, 1/2 is sent for w and 0 for idle. Of sqrt(2) / 4 each of the two may
# take 1/4.
LAYERS = Case(
    "clipped layers",
    [client(PLAIN)],
    Setting(rounds=1, lr=0.25, clips=(("layer", 2**0.5 / 4),)),
    [{"w": 0.75, "idle": 1.0, "b": 1.0}],
    [2.0],
    module=Offset,
)

# By adamw, which shrinks what has no gradient, too (see ADAMW), idle would be 3/4.
FREEZE = Case(
    "frozen by name",
    [client(PLAIN)],
    Setting(
        rounds=1,
        optimizer="adamw",
        lr=0.5,
        betas=(0.5, 0.5),
        eps=2.0,
        weight_decay=0.5,
        freeze="^id",
    ),
    [{"w": 0.5, "idle": 1.0, "b": 1.0}],
    [2.0],
    module=Offset,
)

# Sent are -1/4 by FAR, 1/4 by PLAIN, 1 by STEEP and, by nobody's client, a 0 that does not count:
# the median is 1/4 (of all four it would be 1/8). The losses: (1/2 + 1/2 + 3 * 2) / 5.
MEDIAN = Case(
    "median",
    [client(FAR), client(), client(PLAIN), client(STEEP, STEEP, STEEP)],
    Setting(rounds=1, lr=0.25, aggregator="median"),
    [{"w": 0.75}],
    [1.4],
)

MESSAGES: list[Case] = [
    *(LOSS, FLUTE, VARIANCE, CAP, RMS, UPDATE, UNIFORM),
    *(CLIPPED, LAYERS, FREEZE, MEDIAN),
]
