"""SuffixDecoding: replay recorded agent calls against suffix trees, then the same texts through a virtual engine at rising load."""

from __future__ import annotations

from presage.bench.draft import Replay, learn, replay
from presage.draft.registry import make_drafter
from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.speculation import Way, by_position, crossing, gpu, mean_of, rate, replayed
from presage.reproduce.texts import recorded, split

CAP = 16
SUFFIX = {"num_speculative_tokens": CAP}
DRAFTERS = {
    "suffix": ("suffix", SUFFIX),
    "suffix, trees": ("suffix", SUFFIX | {"suffix_decoding_tree": True, "suffix_decoding_max_spec_factor": 4.0}),
    "own text only": ("suffix", SUFFIX | {"suffix_decoding_max_cached_requests": 0}),
    "prompt lookup": ("ngram", {"num_speculative_tokens": CAP, "prompt_lookup_min": 2, "prompt_lookup_max": 5}),
}
AGENTS = ("agent", "multi-agent", "tau-bench", "sql")
CLAIMS = (
    Claim("tokens a step, agents", "6.3 accepted a step (AgenticSQL)", "plain decoding", "recorded agent calls, 4 sources, geometric mean",
          "2 or more tokens a step", 2.0),
    Claim("against prompt lookup", "1.3 to 3x (OpenHands, SWE-Bench)", "prompt lookup, same cap", "the same", "1.15x or more tokens a step", 1.15),
    Claim("both trees", "global and local tree are both needed", "own text only", "the same", "1.3x or more tokens a step", 1.3),
    Claim("open-ended chat", "gains least where nothing repeats", "agents' tokens a step", "AlpacaEval answers",
          "half or less of the agents' tokens a step", 0.5, 1.0),
    Claim("one request at a time", "1.8 to 4.5x decoding speed", "plain decoding", "agent calls; Llama-3.1-8B on an H100 by roofline",
          "1.8x or more", 1.8),
    Claim("microseconds a drafted token", "12 to 20 us", "the paper's C++", "agents", "20 us or less on this CPU", 20.0, 40.0, "us"),
)  # fmt: skip


def run(job: Job) -> Measured:
    """Replays by workload and drafter, then the load sweep."""
    found: dict[str, dict[str, Replay]] = {}
    for name in (*AGENTS, "maths", "chat"):
        past, now = split(recorded(job, name, job.pick(260, 24), job.pick(2000, 500), job.pick(600, 150)), job.pick(100, 12))
        found[name] = {}
        for label, (method, settings) in DRAFTERS.items():
            drafter = make_drafter(method, settings)
            learn(drafter, past)
            found[name][label] = replay(drafter, now, name=label, concurrency=4, cap=CAP)
        job.say(f"{name}: {found[name]['suffix'].figures()['tokens_per_step']:.2f} tokens a step")
    loads, speeds = _sweep(job, ("agent", "tau-bench"), "agents")
    speeds |= _sweep(job, ("chat",), "chat")[1]
    tokens = {label: mean_of([found[n][label].figures()["tokens_per_step"] for n in AGENTS]) for label in DRAFTERS}
    chat = found["chat"]["suffix"].figures()["tokens_per_step"]
    drafted = sum(found[n]["suffix"].drafted for n in AGENTS)
    return Measured(
        values={
            "tokens a step, agents": tokens["suffix"],
            "against prompt lookup": tokens["suffix"] / tokens["prompt lookup"],
            "both trees": tokens["suffix"] / tokens["own text only"],
            "open-ended chat": chat / tokens["suffix"],
            "one request at a time": speeds["agents, all verified"][0],
            "microseconds a drafted token": 1e6 * sum(found[n]["suffix"].draft_seconds for n in AGENTS) / drafted,
        },
        stops="; ".join(crossing(name, loads, ratio) for name, ratio in speeds.items()),
        panels=[
            Panel("accepted by position", "place in the draft", "share of steps", {n: by_position(found[n]["suffix"]) for n in found}),
            Panel("Llama-3.1-8B, H100 (roofline)", "concurrent requests", "tokens/s against plain decoding",
                  {k: (loads, v) for k, v in speeds.items()}, logx=True, level=1.0),
        ],
        grids=[_grid(found)],
        notes=[
            "Replay: a recorded output stands in for the model, so a draft is accepted as far as it agrees with it. The drafter has seen the "
            "requests before the replayed ones, as a running server would have.",
            "The load sweep charges 4 us a look-up and request, and counts decoding time alone: prompts cost both sides the same.",
        ],
    )  # fmt: skip


def _sweep(job: Job, names: tuple[str, ...], label: str) -> tuple[list[int], dict[str, list[float]]]:
    """Tokens per second against plain decoding by load; enough requests that the largest load lasts."""
    rows = [one for name in names for one in recorded(job, name, job.pick(700, 30), job.pick(1000, 200), job.pick(200, 60))]
    past, now = split(rows[::2] + rows[1::2], job.pick(150, 10))
    target, loads = gpu(job), [1, 16, 64, 128, 256] if not job.quick else [1, 16]
    ways = {
        "plain": Way(),
        f"{label}, all verified": Way(lambda: make_drafter("suffix", SUFFIX), "fixed", (("num_speculative_tokens", CAP),), CAP),
        f"{label}, marginal length": Way(lambda: make_drafter("suffix", SUFFIX), "marginal", (), CAP),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for load in loads:
        for name, way in ways.items():
            # One request at a time needs fewer of them to average out.
            speeds[name].append(rate(replayed(target, now[: max(40, 3 * load)], past, load, way)))
        job.say(f"load {load}: " + ", ".join(f"{name} {v[-1]:.0f} tokens/s" for name, v in speeds.items()))
    plain = speeds.pop("plain")
    return loads, {name: [a / b for a, b in zip(v, plain)] for name, v in speeds.items()}


def _grid(found: dict[str, dict[str, Replay]]) -> Grid:
    rows = [[n, *(f"{o[k].figures()['tokens_per_step']:.2f} ({o[k].figures()['drafted_per_step']:.1f})" for k in DRAFTERS)] for n, o in found.items()]
    return Grid("Tokens a step (drafted a step)", ["workload", *DRAFTERS], rows)


RECIPE = Recipe(
    "SuffixDecoding: drafts from suffix trees over past outputs", "Oliaro et al., NeurIPS 2025, arXiv 2411.04975", "simulation", CLAIMS, run
)  # fmt: skip
