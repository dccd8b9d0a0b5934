"""Post-training quantisation with calibration text: from a bf16 checkpoint to a compressed-tensors one that the integer kernels load.

Layer by layer: the windows run through the layer as it is, which gives every linear's second moments; scales are folded (awq, smoothquant);
weights are rounded (to nearest, or with compensation); then the windows run through the quantised layer, so that the next one is
calibrated on what it will see. Within a layer all statistics come from its unquantised self.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from presage.core.errors import CheckpointError, ConfigError, UnsupportedModel
from presage.models.base import Model
from presage.models.loading import open_checkpoint
from presage.models.loading.checkpoint import Checkpoint
from presage.models.loading.quantized import quantization_config
from presage.models.registry import build_model
from presage.quantize.awq import awq_scale
from presage.quantize.canonical import Canonical, fuse
from presage.quantize.formats.compressed_tensors_writer import HEAD, write_checkpoint
from presage.quantize.gptq import Form, output_error, quantize_gptq, round_nearest
from presage.quantize.observe import CHUNK_ROWS, ObservingOps, Stats, Stream, read_text, windows
from presage.quantize.schemes import Scheme, parse_scheme
from presage.quantize.sites import Site, sites_of
from presage.quantize.smoothquant import ALPHA, smooth_scale
from presage.tokenize import Tokenizer

METHODS = ("rtn", "gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq")
GROUPS = (128, 64, 32)
HEAD_ROWS = 8192
"""Outputs of the LM head that are rounded together: a vocabulary in float32, a few times over, would need more than the rest."""
SENSITIVITY_WINDOWS = 16
Progress = Callable[[str, int, int], None]
Weights = Iterator[tuple[str, Canonical | torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Settings:
    """``method``: one of METHODS. ``samples`` windows of ``length`` tokens. ``bits``: average bits of the layers' weights, scales included,
    up to which the most sensitive linears get 8 bits (0 = none). ``head``: quantise the LM head too, to 8 bits (4 with ``-h4``).
    ``damp``, ``act_order``: of GPTQ. ``alpha``: of SmoothQuant."""

    scheme: str = "w4a8"
    method: str = "gptq"
    samples: int = 128
    length: int = 512
    bits: float = 0.0
    head: bool = True
    damp: float = 0.01
    act_order: bool = False
    alpha: float = ALPHA


@dataclass(frozen=True, slots=True)
class Done:
    """A site that was quantised: its form and the relative squared error of its output on the calibration text (nan: not measured)."""

    name: str
    form: Form
    inputs: int
    outputs: int
    error: float


@dataclass(slots=True)
class Report:
    """What was done: sites of the layers in order, and remarks (a smaller group, a linear kept in 8 bits, an expert with too little text)."""

    folder: Path
    sites: list[Done] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def average_bits(self) -> float:
        """Bits per weight over all sites, scales of groups included."""
        whole = sum(s.inputs * s.outputs for s in self.sites)
        return sum(s.inputs * s.outputs * s.form.average_bits for s in self.sites) / max(whole, 1)


def calibrate(
    model: str | Path,
    out: str | Path,
    text: str | Path | torch.Tensor | None = None,
    settings: Settings = Settings(),
    progress: Progress | None = None,
) -> Report:
    """Quantise the checkpoint ``model`` (folder or name) into the new folder ``out``.

    ``text``: calibration text (a text file, JSON lines, or windows of ids int64 [n, L]); only plain ``rtn`` does without.
    ``progress(what, done windows, all)``. Embeddings, norms, biases and routers stay as they are. Raises ConfigError (scheme, method, text,
    budget), CheckpointError (not a folder, quantised already, ``out`` has one) and UnsupportedModel.
    """
    form, source = form_of(settings), _open(model)
    ids = _ids(source, text, settings)
    built, report = build_model(source, torch.float32, ObservingOps()), Report(Path(out))
    if ids is not None and ids.shape[1] > built.max_len:
        raise ConfigError(f"windows of {ids.shape[1]} tokens are longer than the model's {built.max_len}", param="length")
    work = _Work(built, form, settings, report, progress or (lambda what, done, total: None))
    with torch.inference_mode():
        provenance = {"scheme": settings.scheme, "calibrator": settings.method, **({} if ids is None else {"windows": list(ids.shape)})}
        write_checkpoint(Path(out), source, work.weights(ids), provenance)
    return report


def form_of(settings: Settings) -> Form:
    """The scheme as a form of weights. Raises ConfigError for settings that make no sense."""
    if settings.method not in METHODS:
        raise ConfigError(f"unknown method {settings.method!r}; known: {', '.join(METHODS)}", param="method")
    scheme = parse_scheme(settings.scheme)
    if scheme.weight_bits == 16:
        raise ConfigError(f"{settings.scheme} does not quantise weights, so there is nothing to calibrate", param="scheme")
    if min(settings.samples, settings.length) < 1 or settings.damp < 0 or not 0 <= settings.alpha <= 1:
        raise ConfigError("samples and length are positive, damp is not negative, alpha is between 0 and 1")
    return _form(scheme)


def _form(scheme: Scheme) -> Form:
    return Form(scheme.weight_bits, scheme.group_size, scheme.symmetric, scheme.activation_bits)


def fitting(form: Form, k: int) -> Form:
    """The form with the largest group of at most its own that divides K inputs; 8 bits, one scale an output, if none does."""
    if not form.group or k <= form.group or k % form.group == 0:
        return form
    group = next((g for g in GROUPS if g < form.group and k % g == 0), 0)
    return Form(form.bits, group, form.symmetric, form.activations) if group else eight(form)


def eight(form: Form) -> Form:
    """8 bits with one scale an output, for the same activations."""
    return Form(8, 0, True, form.activations)


def _open(model: str | Path) -> Checkpoint:
    source = open_checkpoint(model)
    if quantization_config(source.config) is not None:
        raise CheckpointError(f"{source.path}: the checkpoint is quantised already; start from the original weights")
    if not source.path.is_dir():
        raise UnsupportedModel(f"{source.path}: only Hugging Face folders can be quantised", param="model")
    return source


def _ids(source: Checkpoint, text: str | Path | torch.Tensor | None, settings: Settings) -> torch.Tensor | None:
    if isinstance(text, torch.Tensor):
        return text
    if text is None:
        if settings.method == "rtn" and not settings.bits:
            return None
        raise ConfigError(f"{'a budget of bits' if settings.bits else f'method {settings.method}'} needs calibration text", param="calibrate")
    return windows(read_text(Path(text)), Tokenizer.load(source), settings.samples, settings.length)


class _Work:
    """One run over a model."""

    def __init__(self, model: Model, form: Form, settings: Settings, report: Report, progress: Progress) -> None:
        self.model, self.form, self.settings, self.report, self.progress = model, form, settings, report, progress
        self.head = _form(parse_scheme(parse_scheme(settings.scheme).head))
        self.raised: set[str] = set()

    def weights(self, ids: torch.Tensor | None) -> Weights:
        """All tensors that change, layer by layer."""
        if ids is not None and self.settings.bits:
            self.raised = self._choose(ids[:: max(1, len(ids) // SENSITIVITY_WINDOWS)])
        stream = None if ids is None else Stream(self.model, ids)
        for i in range(len(self.model.layers)):
            yield from self._layer(i, stream)
        if self.settings.head:
            yield self._head(stream)

    def _layer(self, i: int, stream: Stream | None) -> Weights:
        sites = sites_of(self.model, i)
        if stream is not None:
            self._run(stream, i, sites, "observing", keep=False)
        changed: dict[str, torch.Tensor] = {}
        for site in sites:
            changed |= self._scale(site)
        found: dict[str, Canonical] = {}
        for site in sites:
            found |= self._round(site)
        if stream is not None:
            self._run(stream, i, [], "running quantised", keep=True)
        yield from changed.items()
        yield from found.items()
        for site in sites:
            # What is written is not needed any more: the next layers only see the stream.
            site.cell.weight = torch.empty(0, site.cell.k)

    def _run(self, stream: Stream, i: int, sites: Sequence[Site], what: str, keep: bool) -> None:
        for site in sites:
            site.cell.watch()
        for done in stream.run(i, keep):
            self.progress(f"layer {i + 1} of {len(self.model.layers)}, {what}", done, len(stream.ids))

    def _form(self, site: Site) -> Form:
        if site.name in self.raised:
            return eight(self.form)
        form = fitting(self.form, site.cell.k)
        if form.bits != self.form.bits:
            self._note(f"linears of {site.cell.k} inputs have 8 bits, since no group size divides them")
        elif form.group != self.form.group:
            self._note(f"linears of {site.cell.k} inputs have groups of {form.group}, since {self.form.group} does not divide them")
        return form

    def _note(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)

    def _scale(self, site: Site) -> dict[str, torch.Tensor]:
        method = self.settings.method
        if site.source is None or method in ("rtn", "gptq"):
            return {}
        s = awq_scale(site, self._form(site)) if method.startswith("awq") else smooth_scale(site, self.settings.alpha)
        return site.fold(s)

    def _round(self, site: Site) -> dict[str, Canonical]:
        form, w, stats = self._form(site), site.cell.dense(), site.cell.stats
        rounded = self._rounded(w, form, stats)
        error = output_error(w, rounded.unpack(), stats.hessian) if stats is not None and stats.count else float("nan")
        self.report.sites.append(Done(site.name, form, site.cell.k, len(w), error))
        site.cell.weight, site.cell.stats = rounded, None
        edges = [0, *accumulate(rows for _, rows in site.parts)]
        return {name: rounded.rows(start, stop) for (name, _), (start, stop) in zip(site.parts, pairwise(edges), strict=True)}

    def _rounded(self, w: torch.Tensor, form: Form, stats: Stats | None) -> Canonical:
        if "gptq" not in self.settings.method or stats is None:
            return round_nearest(w, form)
        # With fewer rows than inputs the second moments say nothing about most directions, and GPTQ fits what noise there is.
        if stats.count < w.shape[1]:
            self._note("some linears saw fewer tokens than they have inputs (experts, or too little text): those are rounded to nearest")
            return round_nearest(w, form)
        return quantize_gptq(w, stats.hessian, form, self.settings.damp, self.settings.act_order)

    def _head(self, stream: Stream | None) -> tuple[str, Canonical]:
        (cell,) = self.model.lm_head.packs
        form, stats = fitting(self.head, cell.k), None
        # Per-output 8 bits lose nothing worth compensating in a matrix that is the largest of a small model.
        if form.bits == 4 and stream is not None:
            stats = Stats(cell.k)
            for rows in stream.h.split(CHUNK_ROWS):
                stats.see(self.model.final_norm(rows, torch.empty_like(rows)))
        return HEAD, fuse([self._rounded(rows.float(), form, stats) for rows in cell.weight.split(HEAD_ROWS)])

    def _choose(self, ids: torch.Tensor) -> set[str]:
        """Sites to keep in 8 bits: those whose output loses most by 4 bits, for what they cost, within the budget."""
        gains: list[tuple[float, float, str]] = []
        spent = whole = 0.0
        stream = Stream(self.model, ids)
        for i in range(len(self.model.layers)):
            sites = sites_of(self.model, i)
            self._run(stream, i, sites, "measuring", keep=True)
            for site in sites:
                low, count = self._form(site), site.cell.weight.shape.numel()
                whole, spent = whole + count, spent + count * low.average_bits
                stats, w = site.cell.stats, site.cell.dense()
                cost = count * (eight(low).average_bits - low.average_bits)
                if stats is not None and stats.count and cost > 0:
                    gains.append((output_error(w, round_nearest(w, low).unpack(), stats.hessian) / cost, cost, site.name))
                site.cell.stats = None
        if self.settings.bits < spent / whole:
            raise ConfigError(f"an average of {self.settings.bits} bits is less than the {spent / whole:.2f} of {self.settings.scheme}", param="bits")
        chosen, left = set(), self.settings.bits * whole - spent
        for _, cost, name in sorted(gains, reverse=True):
            if cost <= left:
                chosen.add(name)
                left -= cost
        self._note(f"in 8 bits: {', '.join(sorted(chosen)) or 'nothing, the budget is too small'}")
        return chosen
