"""AWQ: the scale of input channels that rounding likes best, searched for (Lin et al., arXiv 2306.00978).

Channels with large inputs are multiplied by s = mean|x|^r, so that their weights lose less; the best r of a grid is the one with the least
output error, which the second moments of the inputs give exactly, tr(E H E^T), without running the layer.
"""

from __future__ import annotations

import torch

from presage.quantize.gptq import Form, round_nearest
from presage.quantize.sites import Site

RATIOS = tuple(i / 20 for i in range(20))
LEAST = 1e-4
ROWS = 512
"""Outputs looked at, evenly spread: the best ratio hardly depends on more of them."""


def awq_scale(site: Site, form: Form) -> torch.Tensor:
    """The best s [K] for the site's weight; ones if no ratio is better than none. Needs the site's statistics (else ones)."""
    cell = site.cell
    if cell.stats is None or not cell.stats.count:
        return torch.ones(cell.k)
    w = cell.dense()
    w = w[:: max(1, len(w) // ROWS)]
    mean, hessian = site.shared(cell.stats.mean), cell.stats.hessian
    best, chosen = float("inf"), torch.ones(cell.k)
    for ratio in RATIOS:
        s = mean.pow(ratio).clamp_min(LEAST)
        s = s / (s.amax() * s.amin()).sqrt()
        lost = w - round_nearest(w * s, form).unpack() / s
        error = float(((lost @ hessian) * lost).sum())
        if error < best:
            best, chosen = error, s
    return chosen
