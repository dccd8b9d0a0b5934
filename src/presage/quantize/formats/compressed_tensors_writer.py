"""Writes a quantised checkpoint in the compressed-tensors format, streaming: what it holds is one shard, never the model.

``pack-quantized`` for 4-bit weights (with int8 ``input_activations`` for W4A8) and for weight-only 8 bits, ``int-quantized`` for W8A8;
a model with both says ``mixed-precision`` and each group its own format.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from presage.core.errors import CheckpointError, UnsupportedModel
from presage.quantize.canonical import Canonical
from presage.quantize.formats.targets import module_class, module_of, targeted
from presage.quantize.formats.words import counted, pack_words, signed

if TYPE_CHECKING:
    from presage.models.loading.checkpoint import Checkpoint

SHARD_BYTES = 1 << 30
HEAD = "lm_head.weight"
PART = "shard-{}.part"
"""Names of shards until their number is known."""
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of the source's folder that are copied as they are."""


def write_checkpoint(
    folder: Path,
    source: Checkpoint,
    quantised: Iterable[tuple[str, Canonical | torch.Tensor]],
    scheme: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write ``source`` with some tensors replaced into ``folder`` (made if need be) and return it.

    ``quantised`` yields (tensor name as in ``source.names()``, its new value), each once, in any order: a Canonical, or a dense tensor
    where a calibrator changed one (a norm that took up a scale). All other tensors are copied. A tied head may come as a tensor of its
    own, ``lm_head.weight``: the copy is then untied, since rows of the embedding stay dense. What the configuration says of bits, groups
    and activations follows from the Canonicals; ``scheme`` is recorded beside it as provenance (JSON values: name, calibrator,
    perplexity). ``ignore``: modules to list as not quantised, names or ``re:`` patterns; those left dense are listed anyway.
    Raises CheckpointError (the folder has a checkpoint already; a name that the source lacks) and UnsupportedModel (a form that the
    format has no place for: two levels of scales, permuted inputs). Until the last step the folder has no config.json, so what an
    interrupted run leaves behind does not load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: has a checkpoint already")
    for part in folder.glob(PART.format("*")):
        part.unlink()
    writer = CompressedTensorsWriter(folder, shard_bytes)
    rest, config = dict.fromkeys([*source.names(), HEAD]), dict(source.config)
    for name, weight in quantised:
        if name not in rest:
            raise CheckpointError(f"{name} is no tensor of {source.path}, or came twice")
        del rest[name]
        writer.add(name, weight)
    for name in rest:
        if name in source:
            writer.add(name, source.get(name, dtypes=None))
    if HEAD not in source and HEAD not in rest:
        config["tie_word_embeddings"] = False
    writer.finish(config, ignore, scheme)
    _copy_files(source.path, folder)
    return folder


@dataclass(frozen=True)
class _Form:
    """What the configuration says of a group of modules."""

    bits: int
    group: int
    symmetric: bool
    activations: int

    @property
    def format(self) -> str:
        return "int-quantized" if self.bits == 8 and self.activations == 8 else "pack-quantized"

    def entry(self, targets: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": "group" if self.group else "channel",
            "group_size": self.group or None, "dynamic": False,
        }  # fmt: skip
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        # The package takes 4-bit weights with quantised inputs for int-quantized unless each group says otherwise.
        return {
            "targets": targets, "weights": weights, "input_activations": inputs if self.activations == 8 else None,
            "output_activations": None, "format": self.format,
        }  # fmt: skip


class CompressedTensorsWriter:
    """Collects tensors into shards of about ``shard_bytes``; ``finish`` names them, writes the index and config.json."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._forms: dict[str, _Form] = {}
        self._plain: list[str] = []
        self._shard: dict[str, torch.Tensor] = {}
        self._where: dict[str, int] = {}
        self._parts: list[Path] = []
        self._held = self._total = 0

    def add(self, name: str, weight: Canonical | torch.Tensor) -> None:
        """One tensor under its full name. A Canonical becomes several, named after its module."""
        if isinstance(weight, torch.Tensor):
            if weight.dim() == 2 and name.endswith(".weight"):
                self._plain.append(module_of(name))
            self._put(name, weight)
            return
        module = module_of(name)
        form = _form(module, weight)
        self._forms[module] = form
        for suffix, tensor in (_int_parts if form.format == "int-quantized" else _packed_parts)(weight, form):
            self._put(f"{module}.{suffix}", tensor)

    def finish(self, config: Mapping[str, Any], ignore: Iterable[str] = (), provenance: Mapping[str, Any] | None = None) -> None:
        """Write what is left, the index and config.json (``config`` with a quantization_config). Raises CheckpointError if nothing was
        quantised, or a module that is to be ignored."""
        if not self._forms:
            raise CheckpointError(f"{self._folder}: no tensor was quantised")
        quantization = self._config(list(ignore)) | ({"provenance": dict(provenance)} if provenance else {})
        self._flush()
        count = len(self._parts)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for i in range(count)]
        for part, file in zip(self._parts, files, strict=True):
            part.rename(self._folder / file)
        if count > 1:
            weight_map = {name: files[i] for name, i in sorted(self._where.items())}
            _write_json(self._folder / "model.safetensors.index.json", {"metadata": {"total_size": self._total}, "weight_map": weight_map})
        _write_json(self._folder / "config.json", {**config, "quantization_config": quantization})

    def _config(self, ignore: list[str]) -> dict[str, Any]:
        by_form: dict[_Form, list[str]] = {}
        for module, form in self._forms.items():
            if targeted(module, ignore):
                raise CheckpointError(f"{self._folder}: {module} is quantised and to be ignored")
            by_form.setdefault(form, []).append(module)
        formats = {form.format for form in by_form}
        # The most frequent form goes by class, the others by name: readers prefer a name, so every module has one form.
        ordered = sorted(by_form.items(), key=lambda item: -len(item[1]))
        groups = {
            f"group_{i}": form.entry(modules if i else sorted({module_class(m) for m in modules}))
            for i, (form, modules) in enumerate(ordered)
        }
        targets = {t for entry in groups.values() for t in entry["targets"]}
        dense = [m for m in self._plain if targeted(m, targets) and not targeted(m, ignore)]
        return {
            "quant_method": "compressed-tensors", "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed", "global_compression_ratio": None, "kv_cache_scheme": None, "config_groups": groups,
            "ignore": ignore + dense,
        }  # fmt: skip

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._where:
            raise CheckpointError(f"tensor {name} is written twice")
        # A clone: safetensors refuses tensors that share memory, and a view would keep all of its base alive.
        self._shard[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._where[name] = len(self._parts)
        self._held += tensor.nbytes
        self._total += tensor.nbytes
        if self._held >= self._limit:
            self._flush()

    def _flush(self) -> None:
        if not self._shard:
            return
        path = self._folder / PART.format(f"{len(self._parts):05d}")
        save_file(self._shard, path, metadata={"format": "pt"})
        self._parts.append(path)
        self._shard, self._held = {}, 0


def _form(module: str, w: Canonical) -> _Form:
    if w.sub is not None or w.low is not None:
        raise UnsupportedModel(f"{module}: compressed-tensors has no place for two levels of scales")
    if w.perm is not None:
        raise UnsupportedModel(f"{module}: compressed-tensors has no place for permuted inputs any more; quantise with static groups")
    if w.bits not in (4, 8) or w.activations not in (8, 16):
        raise UnsupportedModel(f"{module}: W{w.bits}A{w.activations} cannot be written, only weights of 4 or 8 bits")
    if w.codes.dtype == torch.uint8 and w.zero is None:
        raise UnsupportedModel(f"{module}: codes that are counted from 0 without zero points cannot be written")
    k = w.shape[1]
    if w.group < k and k % w.group:
        raise UnsupportedModel(f"{module}: {k} inputs are no multiple of the group size {w.group}")
    return _Form(w.bits, w.group if w.group < k else 0, w.zero is None, w.activations)


def _packed_parts(w: Canonical, form: _Form) -> Iterator[tuple[str, torch.Tensor]]:
    yield "weight_packed", pack_words(counted(w.codes, form.bits), form.bits)
    yield "weight_scale", w.scale
    yield "weight_shape", torch.tensor(w.shape, dtype=torch.int64)
    if w.zero is not None:
        # Zero points are packed down the outputs, unlike codes.
        yield "weight_zero_point", pack_words(counted(w.zero, form.bits).T.contiguous(), form.bits).T.contiguous()


def _int_parts(w: Canonical, form: _Form) -> Iterator[tuple[str, torch.Tensor]]:
    yield "weight", signed(w.codes, form.bits)
    yield "weight_scale", w.scale
    if w.zero is not None:
        yield "weight_zero_point", signed(w.zero, form.bits)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _copy_files(source: Path, folder: Path) -> None:
    for name in COPIED if source.is_dir() else ():
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
