"""The ``presage`` command. Every option is a configuration field: its help is the field's docstring, its variable ``PRESAGE_...``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.config import Env, Yaml

from presage import __version__
from presage.core.config import (
    CacheConfig,
    EngineConfig,
    ExecutorConfig,
    ModelConfig,
    ObservabilityConfig,
    SchedulerConfig,
    SpeculationConfig,
    StructuredOutputsConfig,
)
from presage.core.errors import PresageError
from presage.serve.config import ServerConfig

Flat = Parameter(name="*")
Model = Annotated[ModelConfig, Flat]
Cache = Annotated[CacheConfig, Flat]
Scheduler = Annotated[SchedulerConfig, Flat]
Executor = Annotated[ExecutorConfig, Flat]
Speculation = Annotated[SpeculationConfig, Flat]
Structured = Annotated[StructuredOutputsConfig, Flat]
Observe = Annotated[ObservabilityConfig, Flat]
Http = Annotated[ServerConfig, Flat]

ALIASES = {
    "--model-path": "--model",
    "--schedule-policy": "--scheduling-policy",
    "--max-running-requests": "--max-num-seqs",
    "--chunked-prefill-size": "--max-num-batched-tokens",
    "--context-length": "--max-model-len",
}
"""SGLang's words for the same settings."""

app = App(name="presage", version=__version__, help="Serve language models, fast, on an ordinary CPU.", config=[Env("PRESAGE_", command=False)])
bench = App(name="bench", help="Measure: latency and throughput of an engine here, or any OpenAI-compatible server.")
app.command(bench)
app.register_install_completion_command()


def engine_config(
    name: str, model: ModelConfig, cache: CacheConfig, scheduler: SchedulerConfig, executor: ExecutorConfig,
    structured: StructuredOutputsConfig | None = None, observe: ObservabilityConfig | None = None, speculation: SpeculationConfig | None = None,
) -> EngineConfig:  # fmt: skip
    """One configuration from the command line's groups; the positional model wins."""
    return EngineConfig(
        model=model.model_copy(update={"model": name}) if name else model,
        cache=cache,
        scheduler=scheduler,
        executor=executor,
        speculation=speculation or SpeculationConfig(),
        structured_outputs=structured or StructuredOutputsConfig(),
        observability=observe or ObservabilityConfig(),
    )


@app.command
def serve(
    model_name: Annotated[str, Parameter(name="MODEL")] = "",
    /,
    *,
    model: Model = ModelConfig(),
    cache: Cache = CacheConfig(),
    scheduler: Scheduler = SchedulerConfig(),
    executor: Executor = ExecutorConfig(),
    speculation: Speculation = SpeculationConfig(),
    structured: Structured = StructuredOutputsConfig(),
    observe: Observe = ObservabilityConfig(),
    http: Http = ServerConfig(),
    config: str | None = None,
) -> int:
    """Start an OpenAI-compatible server.

    Parameters
    ----------
    model_name:
        Checkpoint folder, .gguf file, hub name, or presage-tiny (the bundled model).
    config:
        YAML file with the same settings, by flag name.
    """
    from presage.serve.main import serve_forever

    if not http.served_model_name and model.served_model_name:
        http = http.model_copy(update={"served_model_name": model.served_model_name})
    return serve_forever(engine_config(model_name, model, cache, scheduler, executor, structured, observe, speculation), http)


@app.command
def chat(
    *, url: str = "http://127.0.0.1:8000/v1", model: str | None = None, api_key: str = "none", temperature: float = 0.7, system: str = ""
) -> int:
    """Talk to a running server.

    Parameters
    ----------
    url:
        The server's /v1 address.
    model:
        Model name; the server's first one by default.
    api_key:
        Key to send.
    temperature:
        Randomness; 0 always takes the most likely token.
    system:
        System message.
    """
    from presage.serve.talk import chat_session

    return chat_session(url, model, api_key, temperature, system)


@app.command
def complete(
    prompt: str,
    /,
    *,
    url: str = "http://127.0.0.1:8000/v1",
    model: str | None = None,
    api_key: str = "none",
    max_tokens: int = 128,
    temperature: float = 0.7,
) -> int:
    """Complete a prompt on a running server ("-" reads standard input).

    Parameters
    ----------
    prompt:
        The text to continue.
    url:
        The server's /v1 address.
    model:
        Model name; the server's first one by default.
    api_key:
        Key to send.
    max_tokens:
        Longest continuation.
    temperature:
        Randomness; 0 always takes the most likely token.
    """
    from presage.serve.talk import complete_once

    return complete_once(sys.stdin.read() if prompt == "-" else prompt, url, model, api_key, max_tokens, temperature)


@app.command
def replay(log: str, /) -> int:
    """Replay a decision log and check that every decision comes out byte-equal.

    Parameters
    ----------
    log:
        Folder that ``--decision-log`` wrote.
    """
    from presage.engine.replay import replay as run

    print(f"{run(log)} decisions replayed, all byte-equal")
    return 0


def arguments(argv: list[str]) -> list[str]:
    """Command line with aliases replaced."""
    out = []
    for word in argv:
        flag, eq, value = word.partition("=")
        out.append(ALIASES.get(flag, flag) + eq + value)
    return out


def main(argv: list[str] | None = None) -> None:
    """Entry point: typed errors become one line and status 1."""
    from presage.serve import cli_tools  # noqa: F401 (registers bench, run-batch and collect-env)

    words = arguments(sys.argv[1:] if argv is None else argv)
    if "--config" in words and (at := words.index("--config") + 1) < len(words):
        app.config = [Env("PRESAGE_", command=False), Yaml(words[at], must_exist=True, search_parents=False, use_commands_as_keys=False)]
    try:
        result: Any = app(words)
    except PresageError as error:
        print(f"presage: {error.message} [{error.code}]", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left (``| head``)
        sys.stderr.close()
        sys.exit(141)
    sys.exit(result if isinstance(result, int) else 0)


if __name__ == "__main__":
    # Run as a file this module is a second copy; the commands are registered on the imported one.
    from presage.serve.cli import main as imported_main

    imported_main()
