"""Start ``presage serve`` on the bundled model, ask it through the official client, print its figures, and stop it.

    python examples/demo.py

Leaves with status 0 only if both answers came; the server is stopped in every case.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from typing import IO

import openai
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 300.0  # the first start compiles the kernels
HEARTBEATS = 0.6  # the engine process tells the front its counters four times a second


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def server(log: IO[bytes]) -> Iterator[str]:
    """Base URL of a running server. Raises RuntimeError with the end of its log if it does not become ready."""
    port = free_port()
    command = [sys.executable, "-m", "presage.serve.cli", "serve", "presage-tiny", "--port", str(port)]
    # A session of its own, so that Ctrl-C reaches only this script and the engine process can be stopped with the server.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_ready(f"http://127.0.0.1:{port}/ready", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def wait_ready(url: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Return once the server takes requests."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    log.seek(0)
    tail = log.read()[-4000:].decode(errors="replace")
    raise RuntimeError(f"the server did not start (status {process.poll()}); its log ends with:\n{tail}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, and make sure that nothing of it is left."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def complete(client: openai.OpenAI, model: str, prompt: str) -> str:
    """Stream a completion to standard output."""
    print(f"\n> completion: {prompt}", flush=True)
    text = ""
    for chunk in client.completions.create(model=model, prompt=prompt, max_tokens=96, temperature=0.7, seed=1, stream=True):
        part = chunk.choices[0].text if chunk.choices else ""
        text += part
        print(part, end="", flush=True)
    print()
    return text


def chat(client: openai.OpenAI, model: str, message: str) -> str:
    """Stream a chat answer to standard output."""
    print(f"\n> chat: {message}", flush=True)
    text = ""
    messages = [{"role": "user", "content": message}]
    for chunk in client.chat.completions.create(model=model, messages=messages, max_tokens=96, temperature=0.7, seed=1, stream=True):  # type: ignore[call-overload]
        part = (chunk.choices[0].delta.content or "") if chunk.choices else ""
        text += part
        print(part, end="", flush=True)
    print()
    return text


def warm_up(client: openai.OpenAI, model: str) -> None:
    """A few requests whose times are not shown: the first of its shape compiles kernels."""
    began = time.monotonic()
    client.completions.create(model=model, prompt="Hello", max_tokens=4)
    client.completions.create(model=model, prompt="word " * 100, max_tokens=4)
    print(f"warmed up in {time.monotonic() - began:.1f} s")


def figures(url: str) -> dict[str, float]:
    """The server's own numbers from /metrics: sums by sample name."""
    time.sleep(HEARTBEATS)
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    out: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                out[sample.name] = out.get(sample.name, 0.0) + sample.value
    return out


def mean(found: dict[str, float], name: str) -> float:
    """Mean of a histogram."""
    return found.get(f"{name}_sum", 0.0) / max(1.0, found.get(f"{name}_count", 0.0))


def report(before: dict[str, float], after: dict[str, float]) -> None:
    """Print what happened between two readings."""
    found = {name: value - before.get(name, 0.0) for name, value in after.items()}
    tokens, decode = found.get("presage:generation_tokens_total", 0.0), found.get("presage:request_decode_time_seconds_sum", 0.0)
    requests = found.get("presage:request_success_total", 0.0)
    hits, queries = found.get("presage:prefix_cache_hits_total", 0.0), found.get("presage:prefix_cache_queries_total", 0.0)
    print("\nThe server's figures (/metrics):")
    print(f"  requests finished       {requests:8.0f}")
    print(f"  tokens generated        {tokens:8.0f}")
    print(f"  tokens/s of one stream  {(tokens - requests) / decode if decode else 0.0:8.1f}")
    print(f"  mean TTFT (ms)          {1e3 * mean(found, 'presage:time_to_first_token_seconds'):8.1f}")
    print(f"  prefix hits (tokens)    {hits:8.0f} of {queries:.0f} looked up")


def run() -> int:
    """The demonstration."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        print("starting: presage serve presage-tiny (the first start compiles kernels)", flush=True)
        with server(log) as url:
            print(f"ready on {url} after {time.monotonic() - began:.1f} s", flush=True)
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                model = client.models.list().data[0].id
                warm_up(client, model)
                before = figures(url)
                prompt = "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine with her dog. One day,"
                texts = [complete(client, model, prompt), chat(client, model, "Tell me a story about a dog and a red ball.")]
                complete(client, model, prompt)  # the same prompt again, so that the prefix cache has something to find
            report(before, figures(url))
    if not all(texts):
        print("demo: the server sent an empty answer", file=sys.stderr)
        return 1
    return 0


def main() -> None:
    """Entry point; a polite kill also runs the clean-up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(run())
    except (RuntimeError, openai.OpenAIError) as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
