"""Settings of ``presage bench``; vLLM's names. Descriptions become ``--help``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field

from presage.core.config import Group


class RandomLengths(Group):
    """Sizes of generated prompts."""

    input_len: int = Field(32, ge=1)
    """Prompt tokens of a request."""
    output_len: int = Field(128, ge=1)
    """Tokens generated for a request."""
    seed: int = 0
    """Seed of the prompts."""
    output_json: str | None = None
    """File for the results as JSON."""


class ServeBench(Group):
    """Load for a server."""

    backend: Literal["openai", "openai-chat", "vllm", "sglang", "presage"] = "openai"
    """Kind of server; all speak the same API, ``openai-chat`` uses the chat endpoint."""
    base_url: str = "http://127.0.0.1:8000"
    """Address of the server."""
    endpoint: str | None = None
    """Path of requests; /v1/completions, or /v1/chat/completions for ``openai-chat``."""
    model: str = "presage-tiny"
    """Model name to send, and whose tokenizer to use."""
    served_model_name: str | None = None
    """Model name to send, if it differs from ``model``."""
    tokenizer: str | None = None
    """Tokenizer folder or hub name; the model's by default."""
    api_key: str | None = None
    """Key to send."""
    dataset_name: str = "random"
    """Where requests come from: random, sharegpt (first questions of a file), or a workload (azure, mooncake, humaneval, ...; see the guide)."""
    dataset_path: str | None = None
    """File or folder of the data set."""
    num_prompts: int = Field(1000, ge=1)
    """Requests to send."""
    random_input_len: int = 1024
    """Prompt tokens of a random request."""
    random_output_len: int = 128
    """Tokens asked for by a random request."""
    random_range_ratio: float = 0.0
    """Random lengths vary by plus or minus this share."""
    random_prefix_len: int = 0
    """Tokens that all random prompts share in front."""
    sharegpt_output_len: int | None = None
    """Tokens asked for, instead of the recorded answer's length."""
    output_len: int | None = Field(None, ge=1)
    """Tokens asked for of every request of a workload, instead of the recorded answer's length."""
    max_model_len: int = 4096
    """Requests longer than this, answer included, are left out."""
    prompt_ids: bool = True
    """Send token ids to the completions endpoint (exact lengths) instead of text."""
    request_rate: float = Field(float("inf"), gt=0)
    """Requests per second; inf sends all at once, or a trace at its own times."""
    burstiness: float = Field(1.0, gt=0)
    """Shape of the gamma distribution of gaps: 1 = Poisson, less is burstier."""
    replay_speed: float | None = Field(None, gt=0)
    """Send a trace at its recorded times, this many times as fast."""
    ramp_up_strategy: Literal["linear", "exponential"] | None = None
    """Change the rate during the run, from ramp_up_start_rps to ramp_up_end_rps."""
    ramp_up_start_rps: float | None = Field(None, gt=0)
    """Rate at the beginning of a ramp."""
    ramp_up_end_rps: float | None = Field(None, gt=0)
    """Rate at its end."""
    users: int | None = Field(None, ge=1)
    """Closed loop: this many users, each sends its next request after the answer before."""
    think_time: float = Field(0.0, ge=0)
    """Seconds a user, or a conversation without recorded times, waits before the next request."""
    tenants: int = Field(0, ge=0)
    """Tenants to spread requests over; 0 keeps those of the data set."""
    tenant_skew: float = Field(0.0, ge=0)
    """How unequal tenants are: weights 1 / rank ** skew."""
    tenant_keys: dict[str, str] = Field(default_factory=dict)
    """API key of each tenant by name, where the server tells them apart by it."""
    max_concurrency: int | None = Field(None, ge=1)
    """Requests in flight at most; the wait counts into TTFT."""
    goodput: Annotated[list[str], Parameter(consume_multiple=True)] = Field(default_factory=list)
    """Goals in milliseconds: ttft:200 tpot:50 e2el:5000."""
    ignore_eos: bool = False
    """Ask for the full number of tokens whatever the model says."""
    temperature: float = 0.0
    """Randomness of the answers."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields added to every request."""
    header: dict[str, str] = Field(default_factory=dict)
    """HTTP headers added to every request."""
    percentile_metrics: str = "ttft,tpot,itl,e2el"
    """Measures to print, separated by commas."""
    metric_percentiles: str = "99"
    """Percentiles to print, separated by commas."""
    label: str | None = None
    """Name of the run in results and reports; the backend's by default."""
    metadata: dict[str, str] = Field(default_factory=dict)
    """Facts to keep with the result."""
    save_result: bool = False
    """Write the result as JSON."""
    save_detailed: bool = False
    """Write every request's record into the result too."""
    result_dir: str = "."
    """Folder of the result."""
    result_filename: str | None = None
    """Name of the result; made from backend, rate, model and date by default."""
    ready_check_timeout_sec: float = Field(600.0, ge=0)
    """Seconds to wait for the server to answer one request; 0 = do not ask."""
    num_warmups: int = Field(0, ge=0)
    """Requests sent one after another before the measured ones."""
    save_records: str | None = None
    """File for a row per request: .parquet (needs pyarrow) or .csv."""
    report: str | None = None
    """File for the report as one HTML page."""
    client_realtime: bool = True
    """Run this client with real-time priority where the system allows it, so that it is on time on a busy machine."""
    request_timeout: float = Field(6 * 3600.0, gt=0)
    """Seconds a request may take."""
    seed: int = 0
    """Seed of prompts and arrivals."""

    @property
    def is_chat(self) -> bool:
        """Whether requests are chats."""
        return self.backend == "openai-chat" or "chat" in (self.endpoint or "")

    @property
    def path(self) -> str:
        """Path of requests."""
        return self.endpoint or ("/v1/chat/completions" if self.is_chat else "/v1/completions")
