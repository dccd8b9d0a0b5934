"""SmoothQuant: input channels with a large range hand part of it over to the weights (Xiao et al., arXiv 2211.10438)."""

from __future__ import annotations

import torch

from presage.quantize.sites import Site

LEAST = 1e-5
ALPHA = 0.5
"""The paper's; 0.75 to 0.85 suits models with stronger outliers."""


def smooth_scale(site: Site, alpha: float = ALPHA) -> torch.Tensor:
    """s [K] = max|x|^alpha / max|w|^(1 - alpha); 1 where either is nothing. Needs the site's statistics (else ones)."""
    cell = site.cell
    if cell.stats is None or not cell.stats.count:
        return torch.ones(cell.k)
    peak = site.shared(cell.stats.peak)
    s = peak.pow(alpha) / site.shared(cell.dense().abs().amax(0)).clamp_min(LEAST).pow(1 - alpha)
    return torch.where(s > LEAST, s, torch.ones_like(s))
