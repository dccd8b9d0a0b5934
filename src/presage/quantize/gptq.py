"""GPTQ: rounding one input column after the other, each error made good by the columns that are still to come.

Frantar et al., "GPTQ" (arXiv 2210.17323). Rows share the inverse Hessian, so all outputs of a linear are rounded together; columns go in
blocks of 128, inside of which updates are rank one, and the rest of the matrix is corrected once a block. Scales belong to groups that lie
in order, whatever the order of rounding is ("static groups"), so the result needs no permutation at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from presage.core.errors import ConfigError
from presage.quantize.canonical import Canonical

BLOCK = 128
DAMP, MORE_DAMP, LEAST_DAMP, MOST_DAMP = 0.01, 10.0, 1e-6, 1e3
SHRINK = tuple(1 - 0.04 * i for i in range(11))
"""Parts of the full range tried for a group's scale: clipping its extreme a little mostly lowers the error."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a weight is to become. ``group`` 0 is one scale an output; ``activations`` 8 or 16."""

    bits: int
    group: int
    symmetric: bool
    activations: int

    def size(self, k: int) -> int:
        """Inputs that share a scale."""
        return self.group if 0 < self.group < k else k

    @property
    def low(self) -> int:
        """The smallest code; with zero points codes are counted from 0."""
        return 0 if not self.symmetric else -8 if self.bits == 4 else -127

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1 if not self.symmetric else (1 << self.bits - 1) - 1

    @property
    def average_bits(self) -> float:
        """Bits a weight, its share of the group's scale (and zero point) included; per-output scales count as nothing."""
        return self.bits + ((16 if self.symmetric else 16 + self.bits) / self.group if self.group else 0.0)


@dataclass(slots=True)
class Grid:
    """Scales and zero points of groups, both float32 [N, G] (zero all 0 if symmetric)."""

    scale: torch.Tensor
    zero: torch.Tensor


def fit_grid(w: torch.Tensor, form: Form, weight: torch.Tensor | None = None) -> Grid:
    """Scales for w [N, K] float32: for each group the one of several shrunk ranges that gives the least squared error.

    ``weight`` [K]: how much an input's error counts (mean x^2). 4-bit scales are exact in bfloat16, 8-bit ones float32.
    """
    n, k = w.shape
    size = form.size(k)
    groups = w.reshape(n, k // size, size)
    importance = torch.ones(k // size, size) if weight is None else weight.reshape(k // size, size).clamp_min(1e-12)
    best = torch.full(groups.shape[:2], float("inf"))
    kept = Grid(torch.zeros_like(best), torch.zeros_like(best))
    for tried in _candidates(groups, form):
        error = (importance * (groups - _on_grid(groups, tried, form)).square()).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        kept = Grid(torch.where(better, tried.scale, kept.scale), torch.where(better, tried.zero, kept.zero))
    return kept


def _candidates(groups: torch.Tensor, form: Form) -> list[Grid]:
    top, bottom = groups.amax(2), groups.amin(2)
    shrink = SHRINK if form.bits == 4 else SHRINK[:1]
    if not form.symmetric:
        found = []
        for part in shrink:
            high, low = top.clamp_min(0) * part, bottom.clamp_max(0) * part
            scale = stored((high - low) / form.high, form)
            found.append(Grid(scale, (-low / scale.clamp_min(1e-30)).round().clamp(0, form.high)))
        return found
    # The range has one code more below zero than above, so the extreme's sign decides the scale's.
    extreme = torch.where(top >= -bottom, top, bottom)
    full = extreme / form.low if form.bits == 4 else extreme.abs() / form.high
    nothing = torch.zeros_like(full)
    return [Grid(stored(full * part, form), nothing) for part in shrink]


def stored(scale: torch.Tensor, form: Form) -> torch.Tensor:
    """The scale as the file keeps it."""
    return scale.bfloat16().float() if form.bits == 4 else scale


def codes_of(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, form: Form) -> torch.Tensor:
    """Nearest codes, float32; all operands broadcast."""
    step = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (torch.where(scale == 0, torch.zeros_like(w), w / step).round() + zero).clamp(form.low, form.high)


def _on_grid(groups: torch.Tensor, grid: Grid, form: Form) -> torch.Tensor:
    scale, zero = grid.scale[..., None], grid.zero[..., None]
    return (codes_of(groups, scale, zero, form) - zero) * scale


def canonical(codes: torch.Tensor, grid: Grid, form: Form) -> Canonical:
    """Codes float32 [N, K] and their grid in neutral form."""
    kind = torch.int8 if form.symmetric else torch.uint8
    scale = grid.scale.bfloat16() if form.bits == 4 else grid.scale
    zero = None if form.symmetric else grid.zero.to(torch.uint8)
    return Canonical(codes.to(kind), form.bits, scale.contiguous(), form.size(codes.shape[1]), zero, activations=form.activations)


def round_nearest(w: torch.Tensor, form: Form, weight: torch.Tensor | None = None) -> Canonical:
    """w [N, K] float32 on its grid, without compensation."""
    n, k = w.shape
    grid, size = fit_grid(w, form, weight), form.size(k)
    groups = w.reshape(n, k // size, size)
    return canonical(codes_of(groups, grid.scale[..., None], grid.zero[..., None], form).reshape(n, k), grid, form)


def quantize_gptq(w: torch.Tensor, hessian: torch.Tensor, form: Form, damp: float = DAMP, act_order: bool = False) -> Canonical:
    """w [N, K] rounded so that (W - Q) X is small, X having the second moments ``hessian`` [K, K] (any scale).

    ``damp``: what is added to the diagonal, as part of its mean; ten times more each time the factorisation fails. ``act_order``: the inputs
    with the largest second moments are rounded first. Raises ConfigError for shapes that do not fit or a Hessian that is not finite.
    """
    n, k = w.shape
    if hessian.shape != (k, k) or k % form.size(k):
        raise ConfigError(f"a weight of {k} inputs, groups of {form.size(k)} and second moments {list(hessian.shape)} do not fit together")
    if not torch.isfinite(hessian).all():
        raise ConfigError("the calibration text gives activations that are not finite: the checkpoint is broken, or not of this family")
    h, w = hessian.double().clone(), w.float().clone()
    diagonal = h.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(k)
    upper = _inverse_factor(h[order][:, order], damp)
    size = form.size(k)
    grid = fit_grid(w, form, h.diagonal().float()) if act_order or size == k else Grid(torch.zeros(n, k // size), torch.zeros(n, k // size))
    codes = _sweep(w.T[order].contiguous(), upper, order // size, grid, form, not act_order and size < k)
    out = torch.empty(n, k)
    out[:, order] = codes.T
    return canonical(out, grid, form)


def _inverse_factor(h: torch.Tensor, damp: float) -> torch.Tensor:
    """U with inverse(H) = U^T U, upper triangular, float32."""
    mean = h.diagonal().mean()
    while damp < MOST_DAMP:
        damped = h.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
        damp = max(damp * MORE_DAMP, LEAST_DAMP)
    raise ConfigError("the Hessian of a linear cannot be factorised whatever is added to its diagonal")


def _sweep(w: torch.Tensor, upper: torch.Tensor, group_of: torch.Tensor, grid: Grid, form: Form, refit: bool) -> torch.Tensor:
    """Codes [K, N] of a transposed weight [K, N] (used up), inputs in the order they come. ``refit``: a group's scale is chosen when its
    first input is reached, from weights that earlier errors have moved."""
    k, n = w.shape
    codes, owner, size = torch.empty(k, n), group_of.tolist(), form.size(k)
    step = -(-BLOCK // size) * size if refit else BLOCK
    for start in range(0, k, step):
        stop = min(start + step, k)
        part, errors, u = w[start:stop], torch.empty(stop - start, n), upper[start:stop, start:stop]
        for i in range(stop - start):
            g = owner[start + i]
            if refit and (start + i) % size == 0:
                found = fit_grid(part[i : i + size].T, form, 1 / u.diagonal()[i : i + size].square())
                grid.scale[:, g], grid.zero[:, g] = found.scale[:, 0], found.zero[:, 0]
            scale, zero = grid.scale[:, g], grid.zero[:, g]
            code = codes[start + i] = codes_of(part[i], scale, zero, form)
            error = errors[i] = (part[i] - (code - zero) * scale) / u[i, i]
            part[i:].addr_(u[i, i:], error, alpha=-1)
        if stop < k:
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes


def output_error(w: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """Mean squared output error over the mean squared output: tr(E H E^T) / tr(W H W^T)."""
    lost = w.float() - rounded
    whole = ((w.float() @ hessian) * w.float()).sum().item()
    return ((lost @ hessian) * lost).sum().item() / max(whole, 1e-30)
