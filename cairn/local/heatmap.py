"""A comparison as a picture: K, V and hidden states, layers upwards, tokens to the right. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cairn.local.comparison import Comparison
from engine.compare.divergence import KINDS

COLUMNS_MAX = 800  # of more tokens, neighbours share a column, which shows the largest of them
FLOOR = 1e-8  # smaller differences look like none


class NoMatplotlib(ValueError):
    """The optional package is missing; the message says how to install it."""


def check() -> None:
    """Raises ``NoMatplotlib`` before anything is computed for a picture that cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise NoMatplotlib("--png needs matplotlib: pip install 'cairn[plot]'") from error


def draw(comparison: Comparison, file: Path) -> None:
    """Writes a PNG. Raises ``NoMatplotlib``, or ``OSError`` for a file that cannot be written."""
    check()
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    tokens = sum(comparison.lengths)
    group = -(-tokens // COLUMNS_MAX)
    first = comparison.found.first(comparison.tolerance)
    grids = {kind: _shown(comparison.found.differences[kind], group) for kind in KINDS}
    top = max(float(torch.nan_to_num(grid, nan=0.0).max()) for grid in grids.values())
    norm = LogNorm(vmin=FLOOR, vmax=max(top, 10 * comparison.tolerance, 10 * FLOOR))
    figure = Figure(figsize=(10, 6.2), dpi=80, layout="constrained")
    panels = figure.subplots(len(KINDS), 1, sharex=True, squeeze=True)
    for kind, panel in zip(KINDS, panels, strict=True):
        panel.set_facecolor("0.85")  # where there is nothing to compare
        shown = panel.imshow(
            grids[kind].numpy(), aspect="auto", origin="lower", norm=norm, cmap="magma", interpolation="nearest",
            extent=(-0.5, tokens - 0.5, -0.5, len(grids[kind]) - 0.5),
        )  # fmt: skip
        for edge in torch.tensor(comparison.lengths).cumsum(0)[:-1].tolist():
            panel.axvline(edge - 0.5, color="white", linewidth=0.7)
        panel.set_ylabel(f"{kind}\nlayer")
        if first is not None and first.kind == kind:
            panel.plot(first.token, first.layer, "o", markersize=11, fillstyle="none", color="cyan", markeredgewidth=2)
    panels[-1].set_xlabel("token (lines: where segments begin)")
    where = (
        "nothing beyond the tolerance"
        if first is None
        else f"first: {first.kind} of layer {first.layer}, token {first.token}"
    )
    figure.suptitle(f"{comparison.a} against {comparison.b}, {comparison.dtype}: {where}")
    figure.colorbar(shown, ax=panels, label="difference, in root mean squares of the token")
    figure.savefig(file, format="png")


def _shown(grid: Tensor, group: int) -> Tensor:
    """(layers, columns): the largest of each ``group`` of neighbours, zeros as the floor, inf as a large number."""
    finite = torch.nan_to_num(grid, nan=-1.0, posinf=1e6)
    padded = torch.nn.functional.pad(finite, (0, -finite.shape[1] % group), value=-1.0)
    largest = padded.view(len(grid), -1, group).amax(dim=2)
    return torch.where(largest < 0, torch.nan, largest.clamp_min(FLOOR))
