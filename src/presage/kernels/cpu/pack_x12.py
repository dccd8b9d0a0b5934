"""bf16 weights in 12 bits and a bit, without loss: sign and mantissa as they are, exponents by number (see `tiles_wide.py`).

16 exponents cover all of a unit of trained or random weights but for a few units in a thousand; those keep their plain words at the end.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from presage.kernels.cpu.cache import Kernel, device, kernel
from presage.kernels.cpu.layout import X12_INPUTS, layout
from presage.kernels.cpu.pack import PackedLinear, from_blocks
from presage.kernels.cpu.region import HEADER, claim, enter, leave
from presage.kernels.cpu.simd import get_i64, get_u8, get_u16, load_i32, set_i64, set_u8, store_i32, zero_i32
from presage.kernels.cpu.team import Table, Team

PLAIN_BYTES = 16 * X12_INPUTS * 2

_WORDS = 11
_FIRST, _SECOND, _STRIDE, _N, _K, _LANES, _PLANES, _UNITS, _OUT, _AWAY, _SCRATCH = range(HEADER, HEADER + _WORDS)


@device
def _row(table, plane, lane, per_block):  # type: ignore[no-untyped-def]
    """Address of the row of an output, 0 if there is none."""
    place = plane % per_block * 16 + lane
    lanes = get_i64(table, _LANES)
    second = place >= lanes
    row = plane // per_block * lanes + place - (lanes if second else 0)
    if row >= get_i64(table, _N):
        return 0
    return get_i64(table, _SECOND if second else _FIRST) + row * get_i64(table, _STRIDE)


@device
def _value(row, k, width):  # type: ignore[no-untyped-def]
    return get_u16(row, k) if row != 0 and k < width else 0


@device
def _number(numbers):  # type: ignore[no-untyped-def]
    """Turn marks (256 bytes) into numbers, ascending; returns how many there are."""
    count = 0
    for e in range(256):
        if get_u8(numbers, e) != 0:
            set_u8(numbers, e, count)
            count += 1
    return count


@device
def _clear(numbers):  # type: ignore[no-untyped-def]
    for i in range(4):
        store_i32(numbers, i * 16, zero_i32())


@device
def _write_list(numbers, marks, at):  # type: ignore[no-untyped-def]
    """The exponents of a unit, in place (shifted by 7), by number."""
    for e in range(256):
        if get_u8(marks, e) != 0:
            place = get_u8(numbers, e)
            set_u8(at, 2 * place, e << 7 & 255)
            set_u8(at, 2 * place + 1, e >> 1)


@device
def _write_word(at, lane, i, value, number):  # type: ignore[no-untyped-def]
    """Input i of an output: its sign and mantissa, and its exponent's number. Inputs of an eight: bytes 0, 2, 1, 3 of two lines."""
    start, pair, half = at + 64 + i // 8 * 192, i % 8 // 2, i % 2
    byte = pair % 2 + 2 * half
    set_u8(start + pair // 2 * 64 + lane * 4, byte, (value >> 8 & 128) | (value & 127))
    place = start + 128 + lane * 4 + 2 * half + pair // 2
    old = get_u8(place, 0)
    set_u8(place, 0, old | number << 4 * (pair % 2))


@kernel
def count_exponents(per_block: int) -> Any:
    """How many exponents each (plane, unit) has: a byte each at OUT; 255 stands for more than 16."""

    def run(table):  # type: ignore[no-untyped-def]
        rank = enter(table)
        numbers = get_i64(table, _SCRATCH) + 512 * rank
        units, width = get_i64(table, _UNITS), get_i64(table, _K)
        plane = claim(table)
        while plane < get_i64(table, _PLANES):
            for unit in range(units):
                _clear(numbers)
                for lane in range(16):
                    row = _row(table, plane, lane, per_block)
                    for i in range(X12_INPUTS):
                        set_u8(numbers, _value(row, unit * X12_INPUTS + i, width) >> 7 & 255, 1)
                count = _number(numbers)
                set_u8(get_i64(table, _OUT), plane * units + unit, count if count <= 16 else 255)
            plane = claim(table)
        leave(table)

    return run


@kernel
def pack_exponents(per_block: int, unit_bytes: int) -> Any:
    """Write all units; AWAY: int64 per (plane, unit), from a unit to its plain words, 0 if it is packed."""

    def run(table):  # type: ignore[no-untyped-def]
        rank = enter(table)
        marks = get_i64(table, _SCRATCH) + 512 * rank
        numbers = marks + 256
        units, width = get_i64(table, _UNITS), get_i64(table, _K)
        plane = claim(table)
        while plane < get_i64(table, _PLANES):
            for unit in range(units):
                at, away = get_i64(table, _OUT) + (plane * units + unit) * unit_bytes, get_i64(get_i64(table, _AWAY), plane * units + unit)
                set_i64(at, 4, away)
                _clear(marks)
                for lane in range(16):
                    row = _row(table, plane, lane, per_block)
                    for i in range(X12_INPUTS):
                        value = _value(row, unit * X12_INPUTS + i, width)
                        set_u8(marks, value >> 7 & 255, 1)
                        if away != 0:
                            place = at + away + (i // 2 * 16 + lane) * 4 + i % 2 * 2
                            set_u8(place, 0, value & 255)
                            set_u8(place, 1, value >> 8)
                if away == 0:
                    for i in range(4):
                        store_i32(numbers, i * 16, load_i32(marks, i * 16))
                    _number(numbers)
                    _write_list(numbers, marks, at)
                    for lane in range(16):
                        row = _row(table, plane, lane, per_block)
                        for i in range(X12_INPUTS):
                            value = _value(row, unit * X12_INPUTS + i, width)
                            _write_word(at, lane, i, value, get_u8(numbers, value >> 7 & 255))
            plane = claim(table)
        leave(table)

    return run


def _run(function: Kernel, team: Team | None, words: tuple[int, ...], work: int) -> None:
    table = team.table(_WORDS) if team else Table(_WORDS, 1)
    scratch = torch.zeros(512 * (team.threads if team else 1), dtype=torch.uint8)
    table.set(*words, scratch.data_ptr())
    if team:
        team.run(function, table.address, work)
    else:
        ctypes.CFUNCTYPE(None, ctypes.c_int64)(function.address)(table.address)


def pack_x12(weights: Sequence[torch.Tensor], team: Team | None = None) -> PackedLinear:
    """Pack one weight [N, K] (converted to bf16 if it is of another type), or a gate and an up, as ``bf16x12``."""
    form = layout("bf16x12")
    sources = [w.to(torch.bfloat16).contiguous() for w in weights]
    (n, k), lanes = sources[0].shape, form.columns // len(sources)
    units, planes = form.units(k), -(-n // lanes) * form.vectors
    shared = (sources[0].data_ptr(), sources[-1].data_ptr(), 2 * k, n, k, lanes, planes, units)
    counts = torch.empty(planes * units, dtype=torch.uint8)
    _run(count_exponents(form.vectors), team, (*shared, counts.data_ptr(), 0), 2 * n * k)
    plain = counts == 255
    size = planes * units * form.unit_bytes
    place = torch.arange(planes * units) * form.unit_bytes
    away = torch.where(plain, size + (plain.cumsum(0) - 1) * PLAIN_BYTES - place, torch.zeros_like(place))
    data = torch.zeros(size + int(plain.sum()) * PLAIN_BYTES, dtype=torch.uint8)
    _run(pack_exponents(form.vectors, form.unit_bytes), team, (*shared, data.data_ptr(), away.data_ptr()), 2 * n * k)
    return PackedLinear(data, n, k, form, len(sources) == 2)


def unpack_x12(p: PackedLinear) -> torch.Tensor:
    """The bf16 weight [n, k] that `p` holds, bit for bit; of a gated pair [2 n, k], gate first."""
    form, units = p.layout, p.layout.units(p.k)
    planes = p.blocks * form.vectors
    size = planes * units * form.unit_bytes
    body = p.data[:size].view(planes * units, form.unit_bytes)
    table = body[:, :32].contiguous().view(torch.int16).int() & 0xFFFF
    lines = body[:, 64:].reshape(-1, X12_INPUTS // 8, 3, 16, 4)
    bits = lines[:, :, :2].permute(0, 3, 1, 2, 4)[..., [0, 2, 1, 3]].reshape(-1, 16, X12_INPUTS).int()
    nibbles = lines[:, :, 2].permute(0, 2, 1, 3).int()
    # Byte 2 h + p / 2 of an output holds inputs (pair p, half h) of an eight, even pairs in the low nibble.
    pairs = torch.stack([nibbles & 15, nibbles >> 4], -1).view(-1, 16, X12_INPUTS // 8, 2, 2, 2)
    number = pairs.permute(0, 1, 2, 4, 5, 3).reshape(len(body), -1)
    exponents = torch.gather(table, 1, number.long()).view(-1, 16, X12_INPUTS)
    words = (bits & 128) << 8 | bits & 127 | exponents
    away = body[:, 32:40].contiguous().view(torch.int64)[:, 0]
    for unit in torch.nonzero(away)[:, 0].tolist():
        start = unit * form.unit_bytes + int(away[unit])
        plain = p.data[start : start + PLAIN_BYTES].view(torch.int16).int() & 0xFFFF
        words[unit] = plain.view(X12_INPUTS // 2, 16, 2).permute(1, 0, 2).reshape(16, X12_INPUTS)
    rows = words.to(torch.int16).view(torch.bfloat16).view(p.blocks, form.vectors, units, 16, X12_INPUTS)
    rows = rows.permute(0, 1, 3, 2, 4).reshape(p.blocks, form.columns, -1)[:, :, : p.k]
    return from_blocks(p, rows)
