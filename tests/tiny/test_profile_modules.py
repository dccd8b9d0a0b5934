"""Modules of a step under the clock, and energy of an engine and of a server, on the bundled model."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from presage.bench.ask import SCORES, Engine, Server, read_task
from presage.bench.bars import stacked
from presage.bench.modules import ModuleOps, cases, module_executor, profile_case, profile_modules
from presage.bench.profile import Case, sized
from presage.bench.steps import FixedSteps
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.sampling_params import SamplingParams
from presage.execute.executor import TorchExecutor
from presage.execute.sampling.sampler import Sampler
from presage.layers.ops import build_ops
from presage.models.loading import open_checkpoint
from presage.models.registry import build_model
from presage.serve.cli import main
from tests.tiny.families import write_checkpoint
from tests.tiny.rig import geometry_of

SMALL = {"model": "presage-tiny", "kernels": "reference", "max_num_seqs": 4, "max_model_len": 128, "threads": 1}


def cli(*words: str) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def counted(executor: TorchExecutor, ops: ModuleOps, case: Case) -> dict[str, int]:
    """Calls of each timed operation in a step."""
    fixed = FixedSteps(executor, case.batch, case.context, case.known)
    ops.take()
    ops.on = True
    fixed.run(fixed.plan(known=case.known))
    ops.on = False
    fixed.close()
    return {name: len(times) for name, times in ops.take().items()}


def test_every_module_is_called_once_a_layer() -> None:
    case = Case(2, 20)
    executor, ops = module_executor(sized(EngineConfig.of(**SMALL), [case]))
    per_layer = dict.fromkeys(("qkv", "rope", "attention", "o", "gate_up", "down"), 6)
    assert counted(executor, ops, case) == per_layer | {"norm": 13, "head": 1, "embedding": 1, "assemble": 1}
    ops.split = False
    assert counted(executor, ops, case) == per_layer | {"head": 1, "embedding": 1, "assemble": 1}  # norms are inside linear layers


def test_experts_have_their_rows(tmp_path: Path) -> None:
    write_checkpoint("qwen3_moe", tmp_path, torch.float32)
    ops = ModuleOps(build_ops("reference", torch.float32, 1))
    model = build_model(open_checkpoint(str(tmp_path)), torch.float32, ops, max_len=256)
    ops.learn(model)
    executor = TorchExecutor(model, geometry_of(model), Sampler(model.vocab_size), depth=1)
    found = counted(executor, ops, Case(2, 8))
    assert (found["router"], found["combine"], found["gate_up"], found["down"]) == (2, 2, 3, 3)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_splitting_norms_changes_no_decision(kernels: str) -> None:
    executor, ops = module_executor(sized(EngineConfig.of(**SMALL | {"kernels": kernels}), [Case(2, 40)]))
    fixed = FixedSteps(executor, 2, 40)
    plain = fixed.run(fixed.plan()).new.tolist()
    ops.on = True
    assert fixed.run(fixed.plan()).new.tolist() == plain
    fixed.close()


def test_parts_add_up_to_the_step() -> None:
    config = EngineConfig.of(**SMALL)
    wanted = cases([1, 2], [16], [24])
    assert [(c.batch, c.context, c.known) for c in wanted] == [(1, 0, 24), (2, 0, 24), (1, 16, 1), (2, 16, 1)]
    found = profile_modules(config, wanted, repeats=3)
    for p in found:
        assert math.isclose(sum(p.seconds.values()), p.step) and all(v > 0 for k, v in p.seconds.items() if k != "rest")
        assert set(p.around) == ({"loop", "tokenise"} if p.phase == "prefill" else {"loop", "detokenise"})
        assert p.share(*p.seconds) == pytest.approx(1.0) and p.unexplained < 1
    with pytest.raises(ConfigError, match="more than the model's length"):
        profile_modules(config, [Case(1, 500)])


def test_a_slow_operation_is_found() -> None:
    executor, ops = module_executor(sized(EngineConfig.of(**SMALL), [Case(1, 16)]))
    inner = ops.inner.linear
    down = {key for key, name in ops.names.items() if name == "down"}

    def slow(x: torch.Tensor, packed: object, *rest: object) -> None:
        if id(packed) in down:
            threading.Event().wait(0.004)
        inner(x, packed, *rest)  # type: ignore[call-arg, arg-type]

    ops.inner.linear = slow  # type: ignore[method-assign]
    found = profile_case(executor, ops, Case(1, 16), 3)
    assert max(found.seconds, key=lambda k: found.seconds[k]) == "down" and found.share("down") > 0.5


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, target = tmp_path / "bars.html", tmp_path / "modules.json"
    words = ["--batch", "1", "--prompt", "16", "--context", "8", "--repeats", "2", "--kernels", "reference", "--max-model-len", "128"]
    assert cli("profile", "modules", "presage-tiny", *words, "--figure", str(figure), "--json", str(target)) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("prefill 1 x 16", "gate_up", "attention", "detokenise", "clocks cost"))
    rows = json.loads(target.read_text())
    assert [r["phase"] for r in rows] == ["prefill", "decode"] and figure.read_text().count("<rect") > 20
    assert cli("profile", "modules", "presage-tiny", "--context", "none") != 0


def test_bars_are_shares() -> None:
    text = stacked("a <title>", [("one", {"x": 3.0, "y": 1.0, "rest": -1.0})])
    assert "a &lt;title&gt;" in text and "x: 75.0%" in text and "y: 25.0%" in text and 'width="0.0"' in text


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(EngineConfig.of(**SMALL))
    yield made
    made.close()


def test_an_engine_answers_as_many_at_a_time_as_it_is_asked(engine: Engine) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (3, 5, 4, 2)]
    prompts = engine.prompts(4, 12, 1)
    records, texts = engine.ask(prompts, params, 2)
    assert [r.n_out for r in records] == [3, 5, 4, 2] and all(r.ok for r in records)
    inside = max(sum(a.t_sched <= r.t_sched < a.t_done for a in records) for r in records)
    assert inside == 2 and engine.ask(prompts, params, 4)[1] == texts


def test_tasks_and_scores(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"q": "2+2?", "a": "so it is #### 4"}\n\n{"q": "x", "a": "5"}\n')
    assert read_task(tmp_path / "t.jsonl", "q", "a") == [("2+2?", "so it is #### 4"), ("x", "5")]
    with pytest.raises(ConfigError, match="no field 'prompt'"):
        read_task(tmp_path / "t.jsonl")
    with pytest.raises(ConfigError, match="not a task"):
        read_task(tmp_path / "absent.jsonl")
    assert SCORES["number"]("it is 1,004.0.", "#### 1004") and not SCORES["number"]("four", "4") and not SCORES["number"]("4 or 5", "4")
    assert SCORES["exact"](" yes\nand more", "yes") and not SCORES["exact"]("yes and", "yes")
    assert SCORES["contains"]("In PARIS.", "Paris") and SCORES["prefix"](" Paris is", "Paris") and not SCORES["prefix"]("in Paris", "Paris")


def test_energy_of_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, target = tmp_path / "task.jsonl", tmp_path / "energy.json"
    task.write_text('{"prompt": "One day", "answer": ""}\n{"prompt": "The cat", "answer": "no such words at all"}\n')
    words = ["--task", str(task), "--output-len", "4", "--source", "modelled", "--watts", "100", "--idle-seconds", "0.05"]
    more = ["--output-json", str(target), "--kernels", "reference", "--max-model-len", "128"]
    assert cli("measure", "energy", "presage-tiny", *words, *more) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 requests" in lines[0] and "modelled: epyc-zen4-2c, 100 W" in lines[1] and all(line.endswith("(modelled)") for line in lines[2:])
    found = json.loads(target.read_text())
    assert found["correct"] == 1 and found["per_correct_answer"] == pytest.approx(found["energy"]) and found["energy"] > 0
    assert sum(found["joules_by_request"]) <= found["energy"] * 1.001


class Refusing(BaseHTTPRequestHandler):
    """A server that names a model and refuses every second request."""

    asked = 0

    def log_message(self, *args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._say(200, json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Refusing.asked += 1
        usage = {"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": 2}}
        events = [{"choices": [{"text": " four"}]}, {"choices": [{"text": " five", "finish_reason": "length"}]}, usage]
        text = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
        self._say(*((200, text) if Refusing.asked % 2 else (503, "busy")))

    def _say(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


def test_a_server_is_asked_and_failures_are_kept() -> None:
    http = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server = Server(f"http://127.0.0.1:{http.server_port}/v1/")
    records, texts = server.ask([[300, 301, 302], "text", "more"], 2, 1)
    http.shutdown()
    assert server.model == "m" and [r.ok for r in records] == [True, False, True] and texts == [" four five", "", " four five"]
    assert (records[0].n_in, records[0].n_out) == (3, 2) and "503" in records[1].error
    assert server.used() == pytest.approx(sum(s[1] - s[0] for s in server.spans))  # one at a time: spans do not overlap
    with pytest.raises(ConfigError, match="does not say which model"):
        Server("http://127.0.0.1:9")
