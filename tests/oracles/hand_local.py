"""Local training worked out on paper; each derivation stands above its case.

w starts at 1. The examples of a client are all alike or all in one gradient, so no shuffle enters.
"""

from .loop import Setting
from .tiny import FAR, PLAIN, SETTLED, STEEP, Case, Offset, Tied, client

# w = 1:     FAR's |g| = 1 stays, 1.25; STEEP's g = 4 becomes 2, 0.5; mean 0.875. Loss (1/2 + 2)/2.
# w = 0.875: FAR's g = -1.125 stays, 1.15625; STEEP's 3.5 becomes 2, 0.375; mean 0.765625.
#            Loss (1.125^2 / 2 + 2 * 0.875^2) / 2 = (0.6328125 + 1.53125) / 2.
CLIP = Case(
    "clip",
    [client(FAR), client(STEEP)],
    Setting(rounds=2, lr=0.25, clip=2.0),
    [{"w": 0.875}, {"w": 0.765625}],
    [1.25, 1.08203125],
)

# x = 2^-10 has g = 2^-20, clipped to 2^-21, times lr 2^19 is 1/4: the norm is exact, nothing is
# added to it. Loss 2^-21.
CLIP_SMALL = Case(
    "clip of a tiny gradient",
    [client((2.0**-10, 0.0))],
    Setting(rounds=1, lr=2.0**19, clip=2.0**-21),
    [{"w": 0.75}],
    [2.0**-21],
)

# Clipping comes before the pull. g: 4 -> 1, w = 0; then 0 + 2 (0 - 1) = -2, w = 2 (if the pull
# were clipped too: w = 1). Loss (2 + 0) / 2.
CLIP_PROX = Case(
    "clip, then pull",
    [client(STEEP)],
    Setting(rounds=1, lr=1.0, clip=1.0, mu=2.0, epochs=2),
    [{"w": 2.0}],
    [1.0],
)

# lr = 1/2 halves PLAIN's w a step; SETTLED stays at 1 with loss 0. Three and two examples,
# batches of 2:
# keep: 2 steps, w = 1/4, mean (3/4 + 2) / 5; losses 2 * 1/2 + 1/8 over 3 + 2 examples.
# drop: 1 step, w = 1/2, weights 2 and 2, mean (1/2 + 1) / 2; losses 1 over 4.
# wrap: 2 steps of 2 examples, weights 3 and 2 as with keep; losses 1 + 2/8 over 4 + 2.
# wrap with batches of 8: 3 PLAIN count 8 times in one step, losses 8 * 1/2 over 16; (3/2 + 2) / 5.
LAST = [
    Case(
        f"last batch: {last}, batches of {batch}",
        [client(PLAIN, PLAIN, PLAIN), client(SETTLED, SETTLED)],
        Setting(rounds=1, lr=0.5, batch=batch, last=last),
        [{"w": w}],
        [loss],
    )
    for last, batch, w, loss in [
        ("keep", 2, 0.55, 0.225),
        ("drop", 2, 0.75, 0.25),
        ("wrap", 2, 0.55, 0.2083333333333),
        ("wrap", 8, 0.7, 0.25),
    ]
]

# Steps of 2, 1 and again 2 examples: w = 1, 1/2, 1/4, 1/8; losses (2 + 1/4 + 2/16) / 2 over 5.
STEPS = Case(
    "steps go on into the next epoch",
    [client(PLAIN, PLAIN, PLAIN)],
    Setting(rounds=1, lr=0.5, batch=2, epochs=None, steps=3),
    [{"w": 0.125}],
    [0.2375],
)

# STEEP, PLAIN and (1, -1) have gradients 4w, w and w + 1, their mean is 2w + 1/3. lr = 3/8:
# w = 1 -> 1 - 7/8 = 1/8 -> 1/8 - 3/8 * 7/12 = -3/32.
# Losses 2 + 1/2 + 2, then 2/64 + 1/128 + 81/128 = 43/64, over 6.
FULL = Case(
    "full batch by micro-batches, two epochs",
    [client(STEEP, PLAIN, (1.0, -1.0))],
    Setting(rounds=1, lr=0.375, batch=2, full=True, epochs=2),
    [{"w": -0.09375}],
    [5.171875 / 6],
)

# Two steps on PLAIN, g = w, lr = 1/4, momentum 1/2.
# momentum: v = 1, w = 3/4; v = 1/2 + 3/4, w = 3/4 - 5/16 = 7/16. Everything is linear in w and v
#           starts at 0 again, so the second round multiplies by 7/16. Losses (1 + 9/16) / 2 over 2.
# nesterov: v = 1, g + v/2 = 3/2, w = 5/8; v = 1/2 + 5/8 = 9/8, g + v/2 = 19/16, w = 21/64.
#           Losses (1 + 25/64) / 2 over 2.
MOMENTUM = [
    Case(
        optimizer,
        [client(PLAIN)],
        Setting(rounds=2, optimizer=optimizer, lr=0.25, momentum=0.5, epochs=2),
        [{"w": w}, {"w": w * w}],
        [loss, loss * w * w],
    )
    for optimizer, w, loss in [("momentum", 7 / 16, 25 / 64), ("nesterov", 21 / 64, 89 / 256)]
]

# Two steps on PLAIN, g = w, lr = 1/2, betas 1/2, eps 1.
# Step 1: m = v = 1/2, both 1 without bias; w = 1 - 1/2 * 1 / (1 + 1) = 3/4.
# Step 2: m = 1/4 + 3/8 = 5/8 and v = 1/4 + 9/32 = 17/32, without bias 5/6 and 17/24.
# Losses (1 + 9/16) / 2 over 2.
ADAM = Case(
    "adam",
    [client(PLAIN)],
    Setting(rounds=1, optimizer="adam", lr=0.5, betas=(0.5, 0.5), eps=1.0, epochs=2),
    [{"w": 0.75 - 0.5 * (5 / 6) / ((17 / 24) ** 0.5 + 1)}],
    [25 / 64],
)

# y = w x + 1 on PLAIN: g = 2, loss 2^2 / 2. AdamW first shrinks w by lr * weight_decay = 1/4, then
# takes Adam's step 1/2 * 2 / (2 + 2): 3/4 - 1/4. A parameter that the loss does not reach has
# gradient 0 and only shrinks.
ADAMW = Case(
    "adamw",
    [client(PLAIN)],
    Setting(rounds=1, optimizer="adamw", lr=0.5, betas=(0.5, 0.5), eps=2.0, weight_decay=0.5),
    [{"w": 0.5, "idle": 0.75, "b": 1.0}],
    [2.0],
    module=Offset,
)

# y = w x + 1 on PLAIN: g = 2, w = 1 - 2/4; b is frozen.
FROZEN = Case(
    "frozen and unused parameters, one without dimensions",
    [client(PLAIN)],
    Setting(rounds=1, lr=0.25),
    [{"w": 0.5, "idle": 1.0, "b": 1.0}],
    [2.0],
    module=Offset,
)

# y = w^2 x on PLAIN: g = w^2 * 2 w = 2, clipped to 1 (its norm counts once): w = 1 - 1/4.
TIED = Case(
    "tied parameters",
    [client(PLAIN)],
    Setting(rounds=1, lr=0.25, clip=1.0),
    [{"w": 0.75, "again": 0.75}],
    [0.5],
    module=Tied,
)

LOCAL: list[Case] = [
    *(CLIP, CLIP_SMALL, CLIP_PROX, *LAST, STEPS, FULL),
    *(*MOMENTUM, ADAM, ADAMW, FROZEN, TIED),
]
