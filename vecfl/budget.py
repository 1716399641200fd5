"""What the rows of a private run tell of its epsilon: a line of the summary, and a panel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPSILON, DELTA = "privacy/epsilon", "privacy/delta"
NEIGHBOURS = {
    "add-or-remove-one": "one client more or less",
    "replace-one": "another client in the place of one",
}
COLOUR = "#CC79A7"


def spent(latest: Mapping[str, Any]) -> str:
    """ "epsilon 1.98 at delta 0.000995, ..." of the latest values; nothing without a promise."""
    if EPSILON not in latest:
        return ""
    found = latest[EPSILON]  # NaN where it is infinite: JSON has neither
    told = f"epsilon {found:.4g}" if math.isfinite(found) else "no bound: epsilon is infinite"
    z = latest["privacy/noise_multiplier"]
    given = f"at delta {latest[DELTA]:.3g}, noise multiplier {z:.4g}{stands_for(latest)}"
    return f"{told} {given}; neighbours: {NEIGHBOURS[latest['privacy/neighbours']]}"


def stands_for(latest: Mapping[str, Any]) -> str:
    """Whose epsilon it is, where it is not that of the clients that train."""
    clients = latest.get("privacy/stands_for_clients")
    return "" if clients is None else f", as of {int(clients):,} clients (simulated)"


def draw_epsilon(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Epsilon over the rounds."""
    told = [row for row in rows if EPSILON in row]
    rounds, values = [row["round"] for row in told], [row[EPSILON] for row in told]
    axes.plot(rounds, values, color=COLOUR, linewidth=1.5, marker="o", markersize=4)
    latest = {key: value for row in rows for key, value in row.items()}
    known = math.isfinite(values[-1])
    final = f"epsilon {values[-1]:.3g}" if known else "epsilon is infinite"
    axes.set_title(f"Privacy of clients ({final} at delta {latest[DELTA]:.2g})")
    axes.set_ylabel(f"epsilon at evaluations{stands_for(latest)}")
    axes.set_ylim(0, None)
