"""SCAFFOLD, FedDyn and FedNova worked out on paper: two rounds, FAR takes two steps, STEEP one.

w starts at 1 and lr = 1/4, as in `hand`. PLAIN is the third client of the population; it never
comes, so what the server remembers is 2/3 of the mean over the cohort.
"""

from dataclasses import dataclass, field
from fractions import Fraction as F

from .loop import Setting
from .tiny import FAR, PLAIN, STEEP, Case, client


@dataclass(frozen=True)
class Remembering(Case):
    """`remembered`: after each round, what the three clients remember, and the server."""

    remembered: list[tuple[float, ...]] = field(default_factory=list)


THREE = [client(FAR), client(STEEP), client(PLAIN)]
PAIR = {"rounds": 2, "lr": 0.25, "epochs": (2, 1, 1), "cohort": ((0, 1), (1, 0))}


def losses(*rounds: tuple[F, F, F]) -> list[float]:
    """Of w where FAR takes its steps and where STEEP does: three examples a round."""
    return [float(((a - 2) ** 2 + (b - 2) ** 2 + 4 * c**2) / 6) for a, b, c in rounds]


def numbers(*values: F | int) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


# Round 1, c = c_k = 0. FAR: 1 -> 5/4 -> 23/16, it sends -7/16; over K lr = 1/2 that is -7/8, the
# mean of its gradients -1 and -3/4. STEEP: 1 -> 0, it sends 1, over 1/4 that is 4.
# x = 1 - 9/32 = 23/32; c = 2/3 * (-7/8 + 4) / 2 = 25/24.
# Round 2. FAR is corrected by 25/24 + 7/8 = 23/12: -41/32 + 23/12 = 61/96, w = 215/384; there
# -553/384 + 736/384 = 183/384, w = 677/1536. It sends 427/1536; c_k = -23/12 + 427/768 = -1045/768,
# the mean of -41/32 and -553/384. STEEP is corrected by 25/24 - 4 = -71/24: 69/24 - 71/24 = -1/12,
# w = 71/96. It sends -1/48; c_k = 71/24 - 1/12 = 23/8.
# x = 23/32 - (427/1536 - 32/1536) / 2 = 1813/3072; c = (-1045/768 + 23/8) / 3 = 1163/2304.
SCAFFOLD = Remembering(
    "scaffold",
    THREE,
    Setting(algorithm="scaffold", **PAIR),
    [{"w": 23 / 32}, {"w": 1813 / 3072}],
    losses((F(1), F(5, 4), F(1)), (F(23, 32), F(215, 384), F(23, 32))),
    remembered=[
        numbers(F(-7, 8), 4, 0, F(25, 24)),
        numbers(F(-1045, 768), F(23, 8), 0, F(1163, 2304)),
    ],
)

# Round 1 is the same, but c_k are the gradients at x = 1, -1 and 4; c = 2/3 * 3/2 = 1.
# Round 2. FAR is corrected by 1 + 1 = 2: w - 2 + 2 = w, so 23/32 -> 69/128 -> 207/512, it sends
# 161/512. STEEP by 1 - 4 = -3: 23/8 - 3 = -1/8, w = 3/4, it sends -1/32. c_k: -41/32 and 23/8.
# x = 23/32 - (161/512 - 16/512) / 2 = 591/1024; c = (-41/32 + 92/32) / 3 = 17/32.
OPTION_1 = Remembering(
    "scaffold, option 1",
    THREE,
    Setting(algorithm="scaffold", option=1, **PAIR),
    [{"w": 23 / 32}, {"w": 591 / 1024}],
    losses((F(1), F(5, 4), F(1)), (F(23, 32), F(69, 128), F(23, 32))),
    remembered=[numbers(-1, 4, 0, 1), numbers(F(-41, 32), F(23, 8), 0, F(17, 32))],
)

# alpha = 2. Round 1. FAR: 1 -> 5/4, there -3/4 + 2/4 = -1/4, w = 21/16; it sends -5/16 and keeps
# -5/8. STEEP: 1 -> 0, it sends 1 and keeps 2. h = 2/3 * 2 * (-5/16 + 1) / 2 = 11/24;
# w = 1 - 11/32 - 11/48 = 41/96.
# Round 2. FAR: -151/96 + 5/8 = -91/96, w = 255/384; there -171/128 + 5/8 + 2 * 91/384 = -91/384,
# w = 1111/1536; it sends -455/1536 and keeps -5/8 - 455/768 = -935/768. STEEP: 41/24 - 2 = -7/24,
# w = 1/2; it sends -7/96 and keeps 2 - 7/48 = 89/48. h = (-935/768 + 89/48) / 3 = 163/768;
# w = 41/96 + 567/3072 - 163/1536 = 1553/3072.
FEDDYN = Remembering(
    "feddyn",
    THREE,
    Setting(algorithm="feddyn", dyn=2.0, **PAIR),
    [{"w": 41 / 96}, {"w": 1553 / 3072}],
    losses((F(1), F(5, 4), F(1)), (F(41, 96), F(85, 128), F(41, 96))),
    remembered=[
        numbers(F(-5, 8), 2, 0, F(11, 24)),
        numbers(F(-935, 768), F(89, 48), 0, F(163, 768)),
    ],
)

# STEEP comes three times in its one step, so p = 1/4 and 3/4. FAR sends -7/16 / 2, STEEP 1 / 1;
# tau_eff = (2 + 3) / 4: w = 1 - 5/4 * (-7/32 + 3) / 4 = 67/512 (FedAvg: 1 - (-7/16 + 3) / 4).
# Then FAR sends 7/32 (w - 2) = -6699/16384, STEEP w: w + 5/4 * 267/65536 = 35639/262144.
W = F(67, 512)
FEDNOVA = Remembering(
    "fednova",
    [client(FAR), client(STEEP, STEEP, STEEP)],
    Setting(algorithm="fednova", rounds=2, lr=0.25, epochs=(2, 1)),
    [{"w": float(W)}, {"w": 35639 / 262144}],
    [6.78125 / 5, float(((W - 2) ** 2 * F(25, 32) + 6 * W**2) / 5)],
    remembered=[(), ()],
)

# mu = 1: lr mu = 1/4, |a| = 3/4 + 1 for two steps. FAR: 1 -> 5/4, there -3/4 + 1/4 = -1/2,
# w = 11/8; it sends -3/8 / (7/4) = -3/14. tau_eff = (7/4 + 3) / 4 = 19/16:
# w = 1 - 19/16 * (-3/14 + 3) / 4 = 155/896.
NOVA_PROX = Remembering(
    "fednova, mu",
    [client(FAR), client(STEEP, STEEP, STEEP)],
    Setting(algorithm="fednova", rounds=1, lr=0.25, mu=1.0, epochs=(2, 1)),
    [{"w": 155 / 896}],
    [6.78125 / 5],
    remembered=[()],
)

# beta = 1/2: the first gradient moves FAR 1 + 1/2 times, the second once, |a| = 5/2. It goes to
# 5/4, then v = -1/2 - 3/4, w = 25/16; it sends -9/16 / (5/2) = -9/40.
# tau_eff = (5/2 + 3) / 4 = 11/8: w = 1 - 11/8 * (-9/40 + 3) / 4 = 59/1280.
NOVA_MOMENTUM = Remembering(
    "fednova, momentum",
    [client(FAR), client(STEEP, STEEP, STEEP)],
    Setting(
        algorithm="fednova", rounds=1, lr=0.25, optimizer="momentum", momentum=0.5, epochs=(2, 1)
    ),
    [{"w": 59 / 1280}],
    [6.78125 / 5],
    remembered=[()],
)

MEMORIES = [SCAFFOLD, OPTION_1, FEDDYN, FEDNOVA, NOVA_PROX, NOVA_MOMENTUM]
