"""Federated rounds worked out on paper; each derivation stands above its case.

w starts at 1. The examples of a client are all alike or all in one gradient, so no shuffle enters.
"""

from .hand_client import CLIENT
from .hand_local import LOCAL
from .hand_messages import MESSAGES
from .loop import Setting
from .tiny import FAR, PLAIN, STEEP, Case, Tracked, client, masked

# w = 1:      FAR goes to 1 + 1/4 = 1.25, STEEP to 1 - 4/4 = 0; mean (1.25 + 3 * 0) / 4 = 0.3125.
#             Loss (1/2 + 3 * 2) / 4 = 1.625.
# w = 0.3125: FAR goes to w + 1.6875/4 = 0.734375, STEEP to 0; mean 0.734375 / 4 = 0.18359375.
#             Loss (1.6875^2 / 2 + 3 * 2 w^2) / 4 = (1.423828125 + 0.5859375) / 4.
FEDAVG = Case(
    "fedavg, two unequal clients",
    [client(FAR), client(STEEP, STEEP, STEEP)],
    Setting(rounds=2, lr=0.25),
    [{"w": 0.3125}, {"w": 0.18359375}],
    [1.625, 0.50244140625],
)

# FAR:   w = 1 -> 1.25; then g = -0.75 + mu (1.25 - 1) = -0.5, w = 1.375. Loss 1/2 + 0.75^2/2.
# STEEP: w = 1 -> 0; then g = 0 + mu (0 - 1) = -1, w = 0.25. Loss 2 + 0.
# Mean (1.375 + 0.25) / 2 (without the pull it would be 0.71875). Loss 2.78125 / 4.
FEDPROX = Case(
    "fedprox, two local steps",
    [client(FAR), client(STEEP)],
    Setting(rounds=1, lr=0.25, mu=1.0, epochs=2),
    [{"w": 0.8125}],
    [0.6953125],
)

# The second client's gradients at w = 1: STEEP 4, PLAIN 1, (1, -1) has (1 + 1) 1 = 2; with FAR's
# -1 the mean of all four is 6/4. One step of the server: 1 - 0.5 * 1.5 = 0.25.
# Loss (1/2 + 2 + 1/2 + 2) / 4. Batches of 2 and 1 must not be averaged as if they were equal.
FEDSGD = Case(
    "fedsgd, micro-batches of unequal size",
    [client(FAR), client(STEEP, PLAIN, (1.0, -1.0))],
    Setting(algorithm="fedsgd", rounds=1, batch=2, server_lr=0.5),
    [{"w": 0.25}],
    [1.25],
)

# FEDAVG's first round moves w by -0.6875; half of that is 1 - 0.34375.
SERVER_RATE = Case(
    "server learning rate",
    [client(FAR), client(STEEP, STEEP, STEEP)],
    Setting(rounds=1, lr=0.25, server_lr=0.5),
    [{"w": 0.65625}],
    [1.625],
)

# lr = 1/2 in round 0 and 1/4 in round 1, and g = w: 1 -> 1/2 -> 3/8.
SCHEDULE = Case(
    "learning rate by round",
    [client(PLAIN)],
    Setting(rounds=2, lr=lambda t: 0.5 / (t + 1)),
    [{"w": 0.5}, {"w": 0.375}],
    [0.5, 0.125],
)

# FAR goes to 1.5. Nobody else: 1.5. An empty client with weight 1 halves the update: 1.25.
# A client too short for a batch of 2 is as good as empty.
EMPTY = [
    Case(f"{name} client, {weight}", others, setting, [{"w": w}], [0.5])
    for weight, w in [("examples", 1.5), ("uniform", 1.25)]
    for name, others, setting in [
        (
            "empty",
            [client(FAR), client()],
            Setting(rounds=1, lr=0.5, weight=weight),
        ),
        (
            "too short",
            [client(FAR, FAR), client(STEEP)],
            Setting(rounds=1, lr=0.5, batch=2, last="drop", weight=weight),
        ),
    ]
]

NOBODY = Case("no usable client", [client()], Setting(rounds=1), [{"w": 1.0}], [float("nan")])

# With equal weights (min(1, 1) and min(3, 1)) FAR's 1.25 and STEEP's 0 make 0.625.
CAPPED = Case(
    "capped weights",
    [client(FAR), client(STEEP, STEEP, STEEP)],
    Setting(rounds=1, lr=0.25, weight="capped", weight_cap=1),
    [{"w": 0.625}],
    [1.625],
)

# Two of STEEP's three examples are kept: (1.25 + 2 * 0) / 3, losses (1/2 + 2 * 2) / 3.
SUBSET = Case(
    "capped examples",
    [client(FAR), client(STEEP, STEEP, STEEP)],
    Setting(rounds=1, lr=0.25, cap=2),
    [{"w": 1.25 / 3}],
    [1.5],
)

# FAR with m = 3, twice in a wrapped batch of 2: gradient 6 * -1 / 6, w = 1.25, weight 1 * 3.
# STEEP with m = 1 beside an example of m = 0: gradient (4 + 0) / 1, w = 0, weight 2 * (1 + 0) / 2.
# A client with m = 0 alone: gradient 0, weight 0.
# Mean (3 * 1.25 + 1 * 0) / 4, loss (2 * 3/2 + 2) / (2 * 3 + 1).
TOKENS = Case(
    "tokens as weights",
    [client((*FAR, 3.0)), client((*STEEP, 1.0), (5.0, 7.0, 0.0)), client((1.0, 5.0, 0.0))],
    Setting(rounds=1, lr=0.25, batch=2, last="wrap", weight="tokens"),
    [{"w": 0.9375}],
    [5 / 7],
    loss_function=masked,
)

# A squared error of 1e60 is more than float32 holds: that client counts for nothing. Without its
# weight it does not pull to zero either.
NOT_FINITE = Case(
    "a loss that is not finite",
    [client((1e30, 0.0)), client(FAR)],
    Setting(rounds=1, lr=0.25, weight="uniform"),
    [{"w": 1.25}],
    [0.5],
    dropped=(0,),
)

# One and two batches of 1 on PLAIN, lr = 1/2: w = 1/2 and 1/4, mean (1/2 + 2/4) / 3 = 1/3, half of
# the way there is 2/3. Calls 1 and 2: mean 5/3, rounded 2. Trace 1/2 and (1/2 + 1/2) / 2 = 1/2,
# all of it in spite of the server's learning rate. Losses (1 + 1 + 1/4) / 2 over 3.
# Next round everything about w is scaled by 2/3 and its loss by 4/9. Calls 3 and 4: mean 11/3,
# rounded 4. Trace 1/4 + 1/3 = 7/12, then 7/24 + 1/6 = 11/24; mean (7/12 + 2 * 11/24) / 3 = 1/2.
BUFFERS = Case(
    "buffers",
    [client(PLAIN), client(PLAIN, PLAIN)],
    Setting(rounds=2, lr=0.5, batch=1, server_lr=0.5),
    [
        {"w": 2 / 3, "calls": 2, "trace": 0.5, "constant": 7.0},
        {"w": 4 / 9, "calls": 4, "trace": 0.5, "constant": 7.0},
    ],
    [0.375, 0.375 * 4 / 9],
    module=Tracked,
)

HAND: list[Case] = [
    *(FEDAVG, FEDPROX, FEDSGD, SERVER_RATE, SCHEDULE, *EMPTY, NOBODY),
    *(CAPPED, SUBSET, TOKENS, NOT_FINITE, BUFFERS),
    *LOCAL,
    *CLIENT,
    *MESSAGES,
]
