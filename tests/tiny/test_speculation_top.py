"""``presage top``: figures from a server's metrics page, one frame or live."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from presage.core.errors import ConfigError
from presage.serve.cli import main
from presage.serve.cli_top import Sample, Span, fetch, frame, percentile, read
from tests.http.echo import EchoEngine
from tests.http.server import served

PAGE = """\
# TYPE presage:num_requests_running gauge
presage:num_requests_running{model_name="a"} 3
presage:num_requests_running{model_name="b"} 2
# TYPE presage:generation_tokens counter
presage:generation_tokens_total{model_name="a"} 100
# TYPE presage:spec_decode_num_accepted_tokens_per_pos counter
presage:spec_decode_num_accepted_tokens_per_pos_total{model_name="a",position="0"} 9
presage:spec_decode_num_accepted_tokens_per_pos_total{model_name="a",position="1"} 4
# TYPE presage:time_to_first_token_seconds histogram
presage:time_to_first_token_seconds_bucket{model_name="a",le="0.1"} 50
presage:time_to_first_token_seconds_bucket{model_name="a",le="0.2"} 90
presage:time_to_first_token_seconds_bucket{model_name="a",le="+Inf"} 100
presage:time_to_first_token_seconds_count{model_name="a"} 100
presage:time_to_first_token_seconds_sum{model_name="a"} 9
"""


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["top", *words])
    return int(ended.value.code or 0)


def test_a_page_is_read() -> None:
    sample = read(PAGE, 1.0)
    assert sample["num_requests_running"] == 5 and sample["generation_tokens_total"] == 100 and sample["nothing"] == 0
    assert sample.labelled["spec_decode_num_accepted_tokens_per_pos_total"] == {"0": 9, "1": 4}
    assert read(PAGE.replace("presage:", "vllm:"), 1.0)["num_requests_running"] == 5
    # A server with both names gives every family twice.
    assert read(PAGE + PAGE.replace("presage:", "vllm:"), 1.0)["num_requests_running"] == 5
    with pytest.raises(ConfigError):
        read("<html>hello</html>", 1.0)


def test_percentiles_are_those_of_the_buckets() -> None:
    buckets = read(PAGE, 0.0).buckets["time_to_first_token_seconds"]
    assert percentile(buckets, 0.25) == pytest.approx(0.05) and percentile(buckets, 0.5) == pytest.approx(0.1)
    assert percentile(buckets, 0.7) == pytest.approx(0.15) and percentile(buckets, 0.99) == pytest.approx(0.2)
    assert percentile({}, 0.5) is None and percentile({1.0: 0.0, float("inf"): 0.0}, 0.5) is None


def test_rates_are_of_the_time_between_two_samples() -> None:
    old, new = (Sample(at, values={"x": x}, buckets={"h": {1.0: n, 2.0: m}}) for at, x, n, m in ((10, 50, 4, 4), (12, 90, 4, 6)))
    assert Span(old, new).rate("x") == 20 and Span(old, new).share("x", "y") is None
    assert Span(new, Sample(13, values={"x": 7})).grew("x") == 7  # the server was started anew
    assert percentile(Span(old, new).histogram("h"), 0.5) == pytest.approx(1.5)
    assert Span(old, old).histogram("h") == {1.0: 4, 2.0: 4}


def test_one_frame_of_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with served(EchoEngine()) as base:
        body = b'{"model": "presage-tiny", "prompt": "a b c", "max_tokens": 5}'
        first = fetch(base)
        urllib.request.urlopen(urllib.request.Request(f"{base}/v1/completions", body, {"content-type": "application/json"})).read()
        span = Span(first, fetch(base + "/v1/"))
        assert span.grew("generation_tokens_total") == 5 and percentile(span.histogram("time_to_first_token_seconds"), 0.5) is not None
        assert command("--once", "--interval", "0.05", "--url", base) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("running", "KV cache", "tokens/s", "TTFT", "p99"))
    lines = str(frame(base, span, [1.0, 8.0], "gone").renderables[1])
    assert lines == "gone"


def test_a_server_that_is_away_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    assert command("--url", f"http://127.0.0.1:{port}") == 1
    assert "presage serve" in capsys.readouterr().err
    assert command("--url", "not an address") == 1
    assert "no address" in capsys.readouterr().err
    assert command("--url", f"http://127.0.0.1:{port}", "--interval", "0") == 1


def test_ctrl_c_ends_the_live_view_and_restores_the_screen() -> None:
    main_end, their_end = pty.openpty()
    with served(EchoEngine()) as base:
        words = [sys.executable, "-c", "from presage.serve.cli import main; main()", "top", "--url", base, "--interval", "0.1"]
        process = subprocess.Popen(words, stdin=their_end, stdout=their_end, stderr=their_end)
        os.close(their_end)
        seen = b""
        while b"KV cache" not in seen and process.poll() is None:
            seen += os.read(main_end, 4096)
        process.send_signal(signal.SIGINT)
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            try:
                seen += os.read(main_end, 4096)
            except OSError:  # the other end is closed
                break
    assert process.wait(60) == 0
    os.close(main_end)
    assert b"\x1b[?1049h" in seen and b"\x1b[?1049l" in seen and b"Traceback" not in seen
