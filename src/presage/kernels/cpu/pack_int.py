"""Quantised weights in the order in which the matrix product reads them: `Canonical` codes and scales into units of whole lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from presage.core.errors import UnsupportedModel
from presage.kernels.cpu.layout import Layout, layout
from presage.kernels.cpu.pack import PackedLinear, from_blocks, into_planes
from presage.kernels.cpu.team import Team
from presage.quantize.canonical import Canonical

SCALE_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
WHOLE_GROUP = 128
"""Group under which grouped formats run a weight with one scale an output: the scale is repeated."""


def scale_kind(scale: torch.Tensor) -> str:
    """The smallest type that holds every scale exactly."""
    for kind in ("bf16", "f16"):
        if torch.equal(scale.to(SCALE_DTYPES[kind]).float(), scale.float()):
            return kind
    return "f32"


@dataclass(frozen=True, slots=True)
class Flat:
    """A quantised weight with one level of scales: w = scale * (codes - zero) - low, all but the codes per group."""

    codes: torch.Tensor
    bits: int
    group: int
    scale: torch.Tensor
    zero: torch.Tensor | None
    low: torch.Tensor | None
    activations: int


def flat(weight: Canonical) -> Flat:
    """Products of two levels of scales are exact in f32, so a weight with two becomes one with smaller groups (codes of 6 bits become bytes)."""
    w = weight
    if w.sub is None and w.low is None:
        return Flat(w.codes, w.bits, w.group, w.scale, w.zero, None, w.activations)
    parts, ratio = -(-w.shape[1] // w.sub_group), w.group // w.sub_group

    def per_part(scale: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        wide = scale.float().repeat_interleave(ratio, 1)[:, :parts]
        return wide if factor is None else wide * factor.float()

    low = None if w.low is None else per_part(w.scale if w.low_scale is None else w.low_scale, w.low)
    zero = None if w.zero is None else w.zero.repeat_interleave(ratio, 1)[:, :parts]
    return Flat(w.codes, 8 if w.bits > 4 else 4, w.sub_group, per_part(w.scale, w.sub), zero, low, 8)


def integer_format(weight: Canonical) -> str:
    """The format that runs a quantised weight exactly as it is meant (8-bit weights with int8 rows). Raises UnsupportedModel if there is none."""
    w, k, signed = flat(weight), weight.shape[1], weight.codes.dtype == torch.int8
    if w.bits == 8 and signed and w.zero is None and w.low is None:
        return "w8" if w.group == k else f"w8g{w.group}s-{scale_kind(w.scale)}"
    if w.bits == 8 and not signed and w.zero is not None and w.low is None:
        return f"w8g{WHOLE_GROUP if w.group == k else w.group}z-{scale_kind(w.scale)}"
    if w.bits == 4 and w.low is not None and w.zero is None and not signed:
        return f"w4g{w.group}m-f32"
    if w.bits == 4 and w.low is None and signed == (w.zero is None):
        group = WHOLE_GROUP if w.group == k and k % 32 else w.group
        if group == k and k > 256:
            group = WHOLE_GROUP if k % WHOLE_GROUP == 0 else 32
        return f"w4g{group}{'s' if signed else 'z'}-{scale_kind(w.scale)}{'-wide' if w.activations == 16 else ''}"
    form = f"{weight.bits} bits, groups of {weight.group}, {'with' if weight.zero is not None else 'no'} zero points"
    raise UnsupportedModel(f"no kernel for weights of {form}{'' if weight.sub is None else ', two levels of scales'}", param="model")


def _filled(part: torch.Tensor, columns: int) -> torch.Tensor:
    """[n, c] with zero columns up to `columns`."""
    return part.contiguous() if part.shape[1] == columns else torch.nn.functional.pad(part, (0, columns - part.shape[1])).contiguous()


def _code_words(weight: Flat, form: Layout) -> torch.Tensor:
    """Codes as bytes [n, units * unit_k * bits / 8], every 4 bytes a word of one output."""
    width = form.units(weight.codes.shape[1]) * form.unit_k
    if form.bits == 8:
        # Stored from 0 on: int8 codes have their top bit turned.
        return _filled(weight.codes if weight.codes.dtype == torch.uint8 else weight.codes.view(torch.uint8) ^ 0x80, width)
    unsigned = weight.codes if weight.codes.dtype == torch.uint8 else (weight.codes + 8).view(torch.uint8)
    eights = _filled(unsigned, width).view(len(unsigned), -1, 8)
    if form.integer:
        return (eights[:, :, :4] | eights[:, :, 4:] << 4).reshape(len(unsigned), -1)
    # Bytes 0 and 1 are the lower lane: inputs 0, 2 and 4, 6; bytes 2 and 3 the upper one: 1, 3 and 5, 7.
    return (eights[:, :, [0, 4, 1, 5]] | eights[:, :, [2, 6, 3, 7]] << 4).reshape(len(unsigned), -1)


def _by_block(parts: Sequence[torch.Tensor], form: Layout, n: int) -> torch.Tensor:
    """Per-output rows [n, c] of one or two (gated) weights to [blocks, columns, c]."""
    lanes = form.columns // len(parts)
    blocks = -(-n // lanes)
    rows = [torch.nn.functional.pad(p, (0, 0, 0, blocks * lanes - n)).view(blocks, lanes, -1) for p in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def _per_group(part: torch.Tensor, weight: Flat, form: Layout) -> torch.Tensor:
    """Scales or zero points with one column per group of the layout: a wider group's are repeated, missing ones are 0."""
    count = form.units(weight.codes.shape[1]) * form.groups
    if weight.group != form.group:
        part = part.repeat_interleave(-(-weight.group // form.group), 1)[:, :count]
    return _filled(part, count)


def _heads(weights: Sequence[Flat], form: Layout) -> torch.Tensor:
    """Heads of all units, uint8 [blocks, vectors, units, head]: scales, then zero points or minima, 16 outputs side by side."""
    n, units = weights[0].codes.shape[0], form.units(weights[0].codes.shape[1])
    fields = [[_per_group(w.scale.to(SCALE_DTYPES[form.scale]), w, form) for w in weights]]
    if form.zero:
        fields.append([_per_group(w.zero, w, form) for w in weights if w.zero is not None])
    if form.minima:
        fields.append([_per_group(w.low.to(SCALE_DTYPES[form.scale]), w, form) for w in weights if w.low is not None])
    parts = []
    for field in fields:
        rows = _by_block(field, form, n)
        lanes = rows.view(len(rows), form.vectors, 16, units, form.groups).permute(0, 1, 3, 4, 2).contiguous()
        parts.append(lanes.view(len(rows), form.vectors, units, -1).view(torch.uint8))
    return torch.cat(parts, 3)


def pack_int(weights: Sequence[Canonical], team: Team | None = None, fmt: str | None = None) -> PackedLinear:
    """Pack one quantised weight [N, K], or a gate and an up of a gated activation, for `linear`.

    `fmt` names the kernel's format, by default the one that runs the weight as it is. Raises UnsupportedModel if no kernel fits.
    """
    first = weights[0]
    form = layout(fmt or integer_format(first))
    (n, k), units = first.shape, form.units(first.shape[1])
    words = units * form.unit_k * form.bits // 32
    parts = [flat(w) for w in weights]
    planes = into_planes(tuple(_code_words(w, form) for w in parts), n, words, 0, form.columns, team)
    gated = len(weights) == 2
    if form.group:
        codes = planes.view(len(planes), form.vectors, units, -1).view(torch.uint8)
        data = torch.cat([_heads(parts, form), codes], 3).reshape(-1)
        scales_at = 0
    else:
        scales = _by_block([w.scale.float() for w in weights], form, n).reshape(-1)
        data = torch.cat([planes.view(-1).view(torch.uint8), scales.view(torch.uint8)])
        scales_at = planes.nbytes
    return PackedLinear(data, n, k, form, gated, scales_at, first.perm)


def unpack_int(p: PackedLinear) -> torch.Tensor:
    """The exact meaning of packed integers, float32 [n, k] in the input's order; of a gated pair [2 n, k]."""
    form, units = p.layout, p.layout.units(p.k)
    if form.group:
        lines = p.data.view(p.blocks, form.vectors, units, form.unit_bytes)
        body = lines[..., form.head :].reshape(p.blocks, form.vectors, -1, 16, 4)
    else:
        body = p.data[: p.scales_at].view(p.blocks, form.vectors, -1, 16, 4)
    if form.bits == 4:
        body = torch.cat([body & 15, body >> 4], 4)
        if not form.integer:
            body = body[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    codes = body.permute(0, 1, 3, 2, 4).reshape(p.blocks, form.columns, -1).float()
    if form.group:
        scale, zero, low = (part.repeat_interleave(form.group, 2) for part in _read_heads(p, lines))
        w = (codes - zero) * scale - low
    else:
        scale = p.data[p.scales_at :].view(torch.float32).view(p.blocks, form.columns, 1)
        w = (codes - 128) * scale
    rows = from_blocks(p, w[:, :, : p.k])
    if p.perm is None:
        return rows
    out = torch.empty_like(rows)
    out[:, p.perm] = rows
    return out


def _read_heads(p: PackedLinear, lines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scales, zero points, minima) as f32 [blocks, columns, groups]."""
    form = p.layout

    def field(start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        raw = lines[..., start:stop].contiguous().view(dtype)
        lanes = raw.view(p.blocks, form.vectors, -1, form.groups, 16).permute(0, 1, 4, 2, 3)
        return lanes.reshape(p.blocks, form.columns, -1).float()

    width = form.groups * 16 * SCALE_DTYPES[form.scale].itemsize
    scale = field(0, width, SCALE_DTYPES[form.scale])
    zero, low = torch.full_like(scale, 0.0 if form.minima else 8.0 if form.bits == 4 else 128.0), torch.zeros_like(scale)
    if form.zero:
        zero = field(width, form.head, torch.uint8)
    elif form.minima:
        low = field(width, form.head, SCALE_DTYPES[form.scale])
    return scale, zero, low
