"""The client side worked out on paper: optimizers, schedules, work by client, adaptive mu.

w starts at 1. The examples of a client are all alike or all in one gradient, so no shuffle enters.
"""

from .loop import Setting
from .tiny import FAR, PLAIN, STEEP, Case, client

# Two steps on PLAIN, g = w, lr = 1/2, alpha = 3/4, eps = 1.
# Step 1: v = 1/4, w = 1 - 1/2 * 1 / (1/2 + 1) = 2/3.
# Step 2: v = 3/16 + 1/4 * 4/9 = 43/144, w = 2/3 - 1/2 * 2/3 / (sqrt(43)/12 + 1).
# Losses (1 + 4/9) / 2 over 2.
RMSPROP = Case(
    "rmsprop",
    [client(PLAIN)],
    Setting(rounds=1, optimizer="rmsprop", lr=0.5, alpha=0.75, eps=1.0, epochs=2),
    [{"w": 2 / 3 - 1 / 3 / (43**0.5 / 12 + 1)}],
    [13 / 36],
)

# Centered, with momentum 1/2: v = 1/4, mean 1/4, v - mean^2 = 3/16, b = 1 / (sqrt(3)/4 + 1),
# w = 1 - b/2 = x. Then v = 3/16 + x^2/4, mean 3/16 + x/4, and b halves before it grows.
FIRST = 1 / (3**0.5 / 4 + 1)
X = 1 - FIRST / 2
SECOND = FIRST / 2 + X / ((3 / 16 + X**2 / 4 - (3 / 16 + X / 4) ** 2) ** 0.5 + 1)
CENTERED = Case(
    "rmsprop, centered, with momentum",
    [client(PLAIN)],
    Setting(rounds=1, optimizer="centered", lr=0.5, alpha=0.75, eps=1.0, momentum=0.5, epochs=2),
    [{"w": X - SECOND / 2}],
    [(1 + X**2) / 4],
)

# The same with v = 1, w = 1 - 1/2 * 1 / (1 + 1) = 3/4, then v = 1 + 9/16, its root 5/4,
# w = 3/4 - 1/2 * 3/4 / (9/4) = 7/12. Losses (1 + 9/16) / 2 over 2.
ADAGRAD = Case(
    "adagrad",
    [client(PLAIN)],
    Setting(rounds=1, optimizer="adagrad", lr=0.5, eps=1.0, epochs=2),
    [{"w": 7 / 12}],
    [25 / 64],
)

# STEEP's g = 4 is clipped to 1, then decay adds 2 w = 2: w = 1 - 3/4 (clipped with it: 3/4).
# The loss is without the penalty.
DECAY = Case(
    "weight decay after clipping",
    [client(STEEP)],
    Setting(rounds=1, lr=0.25, clip=1.0, decay=2.0),
    [{"w": 0.25}],
    [2.0],
)

# Steps on PLAIN, g = w, with lr 1/2, 1/4, 1/8: w = 1/2, 3/8, 21/64. Both clients begin at 1/2, and
# again in the second round. Losses (1 + 1/4 + 9/64) / 2 over 3.
WITHIN = Case(
    "learning rate by step",
    [client(PLAIN), client(PLAIN)],
    Setting(rounds=2, lr=0.5, factor=lambda step: 0.5**step, epochs=3),
    [{"w": 21 / 64}, {"w": (21 / 64) ** 2}],
    [89 / 384, 89 / 384 * (21 / 64) ** 2],
)

# lr = 1/2 halves PLAIN's w a step. Two epochs of one example: 1/4; one of two examples: 1/2; STEEP
# takes no step. By examples (1/4 + 2 * 1/2) / 3, uniformly (1/4 + 1/2 + 1) / 3.
# Losses 1/2 + 1/8 + 2 * 1/2 over 4.
OWN_WORK = [
    Case(
        f"epochs by client, weights {weight}",
        [client(PLAIN), client(PLAIN, PLAIN), client(STEEP)],
        Setting(rounds=1, lr=0.5, epochs=(2, 1, 0), weight=weight),
        [{"w": w}],
        [13 / 32],
    )
    for weight, w in [("examples", 5 / 12), ("uniform", 7 / 12)]
]

# Of five PLAIN, a token each, two take part and go to 1/2, FAR goes to 1.5: (2 * 1/2 + 1.5) / 3.
# Losses 3 * 1/2 over 3. Five would come to (5 * 1/2 + 1.5) / 6.
TOKEN_CAP = [
    Case(
        f"a cap in tokens, weights by {weight}",
        [client(*[PLAIN] * 5), client(FAR)],
        Setting(rounds=1, lr=0.5, token_cap=2, weight=weight),
        [{"w": 5 / 6}],
        [0.5],
    )
    for weight in ("examples", "tokens")
]

# Two steps on PLAIN, g = w: w_1 = (1 - lr) w, w_2 = ((1 - lr)^2 + mu lr^2) w; the round's loss is
# (w^2 + w_1^2) / 2 over 2. Steps of mu are 1/2, two falls in a row make one down.
# round  lr   mu   w from  to     loss
# 1      3    0    1       4      5/4
# 2      1/2  0    4       1      5           rises: mu = 1/2
# 3      1/2  1/2  1       3/8    5/16        falls once
# 4      1/2  1/2  3/8     9/64   45/1024     falls twice: mu = 0
# 5      1/2  0    9/64    9/256  405/65536
ADAPTIVE = Case(
    "mu goes up and down with the loss",
    [client(PLAIN)],
    Setting(rounds=5, lr=lambda t: 0.5 if t else 3.0, mu=0.0, adaptive=(0.5, 2), epochs=2),
    [{"w": w} for w in (4, 1, 3 / 8, 9 / 64, 9 / 256)],
    [5 / 4, 5, 5 / 16, 45 / 1024, 405 / 65536],
)

CLIENT: list[Case] = [
    *(RMSPROP, CENTERED, ADAGRAD, DECAY, WITHIN, *OWN_WORK, *TOKEN_CAP, ADAPTIVE),
]
