"""From words to what is simulated: a model's config.json, a device's name, a way to price steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from presage.bundled import bundled_path
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.protocols import LatencyModel
from presage.simulate.latency.fitted import Fitted
from presage.simulate.latency.hardware import Hardware, hardware
from presage.simulate.latency.roofline import Roofline
from presage.simulate.latency.table import llmservingsim
from presage.simulate.latency.transfer import Transferred
from presage.simulate.run import Target
from presage.simulate.shape import ModelShape

UTILIZATION = 0.9
"""Share of a device's memory that weights and KV take together."""


def shape_of(model: str | Path, weights: str = "bfloat16", kv: str = "bfloat16") -> ModelShape:
    """A model from its config.json, the folder it lies in, or a bundled one's name. Raises ConfigError if there is none."""
    path = bundled_path(str(model)) or Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: a simulation needs the model's config.json (no weights)", param="model")
    shape = ModelShape.of(path, weights, kv)
    return replace(shape, name=path.parent.name if path.name == "config.json" else path.stem.removesuffix("_config"))


def prices(how: str, model: ModelShape, device: Hardware, tp: int = 1, dtype: str = "bfloat16") -> LatencyModel:
    """``roofline``; a JSON file of ``presage profile fit``; or a folder of LLMServingSim's tables (of one device, scaled to ``tp`` of them).

    Raises ConfigError for anything else.
    """
    path = Path(how)
    if how == "roofline":
        return Roofline(model, device, tp, dtype)
    if path.is_dir():
        tables = llmservingsim(path, model.layers, watts=device.watts)
        return tables if tp == 1 else Transferred(tables, Roofline(model, device, 1, dtype), Roofline(model, device, tp, dtype))
    if path.suffix == ".json" and path.is_file():
        return Fitted.load(path)
    raise ConfigError(f"latency is roofline, the JSON file of a fit, or a folder of operator tables; got {how!r}", param="latency")


def make_target(
    config: EngineConfig, model: ModelShape, device: str, *, tp: int = 1, latency: str = "roofline", dtype: str = "bfloat16",
    max_model_len: int | None = None, memory_utilization: float = UTILIZATION,
) -> Target:  # fmt: skip
    """A model on ``tp`` devices of one kind, priced by ``latency``. Raises ConfigError and NotEnoughMemory."""
    where, s = hardware(device), config.scheduler
    price = prices(latency, model, where, tp, dtype)
    length = min(model.max_len, max_model_len or model.max_len)
    geometry = model.geometry(
        where.memory, tp=tp, block_size=config.cache.block_size, max_num_seqs=s.max_num_seqs, max_num_batched_tokens=s.max_num_batched_tokens,
        max_model_len=length, utilization=memory_utilization, num_blocks=config.cache.num_gpu_blocks_override,
    )  # fmt: skip
    return Target(price, geometry, model.layers, length, idle_watts=tp * where.watts * where.static)
