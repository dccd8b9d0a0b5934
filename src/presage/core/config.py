"""Typed configuration. Field descriptions become ``--help``, the YAML reference and the docs; unknown keys are errors.

Names are vLLM's where the meaning is the same. Every field is a flag (``--max-num-seqs``) and an environment variable
(``PRESAGE_MAX_NUM_SEQS``).
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from presage.core.errors import ConfigError

G = TypeVar("G", bound="Group")


class Group(BaseModel):
    """A group of settings; immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(Group):
    """Which model, in which precision, how long."""

    model: str = "presage-tiny"
    """Checkpoint folder, .gguf file or hub name; ``presage-tiny`` is the bundled model."""
    tokenizer: str | None = None
    """Tokenizer folder or hub name; the model's own by default."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    served_model_name: list[str] = Field(default_factory=list)
    """Names the API answers to; the model's name by default."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of weights, activations and KV; ``auto`` follows the checkpoint (float16 runs as bfloat16)."""
    quantization: str | None = None
    """Weights and activations of linear layers: ``w8a8``, ``w4a8``, ... quantise a bf16 checkpoint while it loads; none = as the checkpoint is."""
    packed_weights_bytes: int = Field(32 << 30, ge=0)
    """Disk space for weights that were quantised while they loaded, so that the next start need not; the oldest go first. 0 = none is kept."""
    max_model_len: int | None = Field(None, ge=1)
    """Longest prompt plus output in tokens; the checkpoint's limit by default."""
    seed: int = 0
    """Seed from which requests without one get theirs."""
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = "auto"
    """``dummy`` fills weights with random numbers (speed measurements)."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's."""
    pooling: Literal["auto", "mean", "last"] = "auto"
    """How embeddings are pooled; ``auto`` is last for decoder models."""


class CacheConfig(Group):
    """The KV cache."""

    kv_cache_memory: str | int | None = None
    """Memory for the KV cache (``4GiB``, bytes); by default ``memory_utilization`` of what is free after loading."""
    memory_utilization: float = Field(0.5, gt=0, le=0.95)
    """Share of the RAM that is available after loading which the KV cache may take."""
    num_gpu_blocks_override: int | None = Field(None, ge=2)
    """Exact number of KV blocks per pool (tests, benchmarks)."""
    block_size: int = Field(32, ge=32, multiple_of=32)
    """Tokens per KV block."""
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """How keys and values are stored: ``auto`` as the model computes, ``int8`` with a scale per token and head, in about half the memory."""
    enable_prefix_caching: bool = True
    """Reuse the KV of prompts that share a prefix."""


class SchedulerConfig(Group):
    """Who runs in a step."""

    scheduling_policy: str = "fcfs"
    """Who goes first: ``fcfs``, ``priority``, ``sarathi``, ``splitfuse``, ``layered``, ``splits``, ``ltr``, ``shortest``, ``fair``, ``deadline``,
    ``cache_aware``, ``budget``, or an entry point of group ``presage.schedulers``."""
    scheduling_config: str | dict[str, Any] | None = None
    """JSON object of the policy's own dials, such as ``{"tbt": 0.05}`` for ``sarathi``; a wrong one is answered with the list of those there are."""
    max_num_batched_tokens: int = Field(512, ge=1)
    """Tokens computed in one step at most."""
    max_num_seqs: int = Field(128, ge=1)
    """Requests that run at once at most."""
    enable_chunked_prefill: bool = True
    """Split long prompts over steps; off = a prompt runs whole or waits."""
    long_prefill_token_threshold: int = Field(0, ge=0)
    """Longest chunk of one prompt in a step; 0 = the whole budget."""
    max_waiting: int = Field(2048, ge=1)
    """Requests that may queue; more are answered with 503."""
    watermark: float = Field(0.01, ge=0, lt=1)
    """Share of blocks kept free when a request is admitted, against thrashing."""


class SpeculationConfig(Group):
    """Guessing ahead."""

    speculative_config: str | dict[str, Any] | None = None
    """JSON object, vLLM's names: ``{"method": "suffix", "num_speculative_tokens": 16}``; ``length`` (marginal, goodput, fixed) and ``rule`` beside
    them. Methods: suffix, ngram, lookahead, model, early_exit, hybrid; none = one token a step."""
    max_draft_tokens: int = Field(512, ge=0)
    """Draft tokens verified in one step at most, over all requests."""


class ObservabilityConfig(Group):
    """What is recorded."""

    decision_log: str | None = None
    """Folder of the decision log; none = not written."""
    decision_log_level: Literal["none", "shape", "tokens"] = "shape"
    """``shape`` keeps lengths and hashes, ``tokens`` also ids (user data)."""
    decision_log_bytes: int = Field(256 << 20, ge=1 << 16)
    """Bytes kept on disk; older files are deleted."""
    disable_log_stats: bool = False
    """Do not print a line of statistics every ten seconds."""

    @property
    def log_folder(self) -> str | None:
        """Folder of the decision log; None if none is written."""
        return None if self.decision_log_level == "none" else self.decision_log


class ExecutorConfig(Group):
    """How steps are run."""

    threads: int = Field(0, ge=0)
    """CPU threads of a step; 0 = all cores this process may use (or OMP_NUM_THREADS)."""
    kernels: Literal["auto", "cpu", "reference"] = "auto"
    """``reference`` runs the plain-torch twins (slow, for checks)."""
    deterministic: bool = True
    """Tokens never depend on what a request was batched with."""
    async_scheduling: bool = True
    """Plan step n+1 while step n runs."""


class StructuredOutputsConfig(Group):
    """Structured output."""

    backend: Literal["xgrammar"] = "xgrammar"
    """Grammar engine."""
    compile_timeout: float = Field(30.0, gt=0)
    """Seconds a grammar may take to compile before it is refused."""


class EngineConfig(Group):
    """Everything an engine needs."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    executor: ExecutorConfig = Field(default_factory=ExecutorConfig)
    speculation: SpeculationConfig = Field(default_factory=SpeculationConfig)
    structured_outputs: StructuredOutputsConfig = Field(default_factory=StructuredOutputsConfig)
    observability: ObservabilityConfig = Field(default_factory=ObservabilityConfig)

    @classmethod
    def of(cls, **args: Any) -> EngineConfig:
        """From flat keyword arguments (``LLM(model=..., max_num_seqs=...)``). Raises ConfigError naming unknown or bad ones."""
        groups: dict[str, dict[str, Any]] = {}
        where = field_groups(cls)
        unknown = [k for k in args if k not in where]
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(sorted(unknown))}", param=unknown[0])
        for key, value in args.items():
            groups.setdefault(where[key], {})[key] = value
        return validated(cls, groups)


def field_groups(cls: type[Group]) -> dict[str, str]:
    """Map each leaf field of a group of groups to the group it lives in."""
    out = {}
    for group, info in cls.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Group):
            out.update(dict.fromkeys(kind.model_fields, group))
    return out


def validated(cls: type[G], data: dict[str, Any]) -> G:
    """Build a group; pydantic's complaint becomes one ConfigError line per bad field."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise ConfigError("; ".join(lines), param=str(error.errors()[0]["loc"][-1]) if error.errors()[0]["loc"] else None) from None
