"""Replay a decision log: the same loop, fed the recorded inputs, must make byte-equal decisions.

The executor does nothing (its results are inputs), stops are the recorded cuts, what a drafter answered is the recorded answers, and at level
``shape`` block names are the recorded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from presage.cache.manager import block_managers
from presage.core.config import EngineConfig
from presage.core.errors import ReplayMismatch
from presage.core.events import Abort, Annotate, Arrive, Drain, Event, Prioritise, ResetCache, Tick, Waited
from presage.core.kv import KVGeometry
from presage.core.plan import NewIds, StepDone, StepFault, StepPlan
from presage.core.protocols import Companion
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.core.table import Table
from presage.core.types import Flag, Kind, Wait
from presage.draft.parts import chosen, parts
from presage.draft.settings import parse_speculative
from presage.engine.answers import RecordedAnswers
from presage.engine.cutter import Cutter
from presage.engine.emitter import Emitter
from presage.engine.log import READABLE, NullLog, decision
from presage.engine.loop import Loop, LoopConfig
from presage.schedule import make_scheduler


def read_frames(folder: str | Path) -> Iterator[tuple[str, Any]]:
    """All frames of a log in order; a truncated last frame (a killed process) ends the stream."""
    for path in sorted(Path(folder).glob("*.plog")):
        data, at = path.read_bytes(), 0
        while at + 4 <= len(data):
            size = int.from_bytes(data[at : at + 4], "little")
            if at + 4 + size > len(data):
                return
            tag, body = msgspec.msgpack.decode(data[at + 4 : at + 4 + size])
            yield tag, body
            at += 4 + size


def log_header(
    config: EngineConfig,
    geometry: KVGeometry,
    layers: int,
    eos: list[int],
    max_model_len: int,
    depth: int = 1,
    lanes: Sequence[KVGeometry] = (),
) -> dict[str, Any]:
    """What a replay needs to rebuild the loop. ``lanes``: geometries of lanes 1 and up."""
    return {
        "config": config.model_dump(mode="json"),
        "geometry": msgspec.to_builtins(geometry),
        "lanes": [msgspec.to_builtins(g) for g in lanes],
        "layers": layers,
        "eos": eos,
        "max_model_len": max_model_len,
        "depth": depth,
    }


class SilentExecutor:
    """Accepts plans and does nothing: their results are in the log."""

    def __init__(self, geometry: KVGeometry, layers: int, depth: int) -> None:
        self.geometry, self.layers, self.depth = geometry, layers, depth

    def start(self, post: Callable[[Event], None]) -> None:
        """Nothing to start."""

    def submit(self, plan: StepPlan) -> None:
        """The recorded result will come."""

    def cut(self) -> None:
        """No bursts."""

    def companions(self) -> tuple[Companion, ...]:
        """None."""
        return ()

    def close(self) -> None:
        """Nothing to close."""


class RecordedNames:
    """Block names in the order in which they were asked for."""

    def __init__(self) -> None:
        self.names: list[bytes] = []

    def root(self, slot: int, req: Request, groups: Any) -> bytes:
        """The next recorded name."""
        return self.names.pop(0)

    def hashes(self, slot: int, index: int, parent: bytes, ids_bytes: bytes) -> bytes:
        """The next recorded name."""
        return self.names.pop(0)


class RecordedCutter(Cutter):
    """Cuts as recorded instead of looking at ids."""

    def __init__(self, table: Table, requests: dict[int, Request], eos: list[int]) -> None:
        super().__init__(table, requests, eos)
        self.cuts: list[list[bytes]] = []

    def open(self, slot: int, req: Request) -> int:
        """Flags as recorded: the stop strings and grammar themselves are not in the log."""
        return super().open(slot, req) | int(req.extras.get("flags", 0))

    def cut(self, plan: StepPlan, done: StepDone, live: np.ndarray) -> NewIds:
        """The next recorded cut; ids are zeros at level shape."""
        off, finish, ids = self.cuts.pop(0)
        offsets = np.frombuffer(off, np.int32)
        values = np.frombuffer(ids, np.int32) if ids else np.zeros(int(offsets[-1]), np.int32)
        return NewIds(plan.slot, offsets, values, np.frombuffer(finish, np.uint8).copy())


class Decisions(NullLog):
    """Keeps decisions as bytes (``made``) instead of writing them."""

    def __init__(self) -> None:
        self.made: list[bytes] = []

    def decided(self, loop: Loop, plan: StepPlan, grants: Any) -> None:
        """Keep one."""
        self.made.append(msgspec.msgpack.encode(decision(loop, plan, grants)))


def recorded(folder: str | Path) -> tuple[dict[str, Any], Iterator[tuple[str, Any]]]:
    """A log's header and the frames behind it. Raises ReplayMismatch for another version, or if the beginning was rotated away."""
    frames = read_frames(folder)
    first: tuple[str, Any] = next(frames, ("", {}))
    tag, header = first
    if tag != "h" or header["version"] not in READABLE:
        raise ReplayMismatch("not a decision log of this version, or its beginning was rotated away")
    return header, frames


def replay(folder: str | Path, emitter: Callable[[Table, dict[int, Request]], Emitter] | None = None) -> int:
    """Replay a log and compare every decision. Returns the number of decisions; raises ReplayMismatch with the first that differs.

    ``emitter`` makes what hears the ids (zeros at level shape) and ends again; by default nobody does.
    """
    header, frames = recorded(folder)
    names, answers, check = (RecordedNames() if header["level"] == "shape" else None), RecordedAnswers(), Decisions()
    loop, cutter = _rebuild(header, names, answers, check, emitter or (lambda table, requests: Emitter(table, requests, lambda emissions: None)))
    waiting: list[bytes] = []
    count = 0
    for tag, body in frames:
        if tag == "d":
            waiting.append(msgspec.msgpack.encode(body))
        elif tag == "n" and body[0] == "unreplayable":
            raise ReplayMismatch(body[1])
        elif tag == "c":
            answers.feed(body)
        elif tag == "i":
            now, events, turn_names, cuts = body
            cutter.cuts.extend(cuts)
            if names is not None:
                names.names.extend(turn_names)
            loop.turn(now, [decode_event(e) for e in events])
            if check.made != waiting:
                raise ReplayMismatch(f"decision {count} differs from the recorded one", step=count)
            if answers.left:
                raise ReplayMismatch(f"before decision {count} the loop did not ask its drafter for a {answers.left[0][0]}", step=count)
            count += len(waiting)
            waiting, check.made = [], []
    return count


def _rebuild(
    header: dict[str, Any], names: Any, answers: RecordedAnswers, log: NullLog, emitter: Callable[[Table, dict[int, Request]], Emitter]
) -> tuple[Loop, RecordedCutter]:  # fmt: skip
    config = EngineConfig.model_validate(header["config"])
    table, requests = Table(), dict[int, Request]()
    cutter = RecordedCutter(table, requests, header["eos"])
    kv = block_managers(config, geometries(header), header["max_model_len"], names)
    answers.cache = kv[0]
    loop = Loop(
        loop_config(config, header["max_model_len"]),
        SilentExecutor(kv[0].geometry, header["layers"], header["depth"]),
        kv,
        make_scheduler(config.scheduler),
        cutter,
        emitter(table, requests),
        table=table,
        requests=requests,
        log=log,
        **recorded_parts(config, answers),
    )
    return loop, cutter


def geometries(header: dict[str, Any]) -> list[KVGeometry]:
    """KV pools of all lanes, lane 0 first."""
    return [msgspec.convert(geometry, KVGeometry) for geometry in (header["geometry"], *header.get("lanes", []))]


def recorded_parts(config: EngineConfig, answers: RecordedAnswers) -> dict[str, Any]:
    """The loop's share of speculation with the recorded answers in the drafter's place; without a drafter they still refuse requests."""
    found = chosen(config)
    return parts(found, answers) if found is not None else {"companions": (answers,)}


def loop_config(config: EngineConfig, max_model_len: int) -> LoopConfig:
    """The loop's share of the engine configuration."""
    s, speculative = config.scheduler, parse_speculative(config.speculation.speculative_config)
    return LoopConfig(
        max_num_seqs=s.max_num_seqs,
        max_num_batched_tokens=s.max_num_batched_tokens,
        max_waiting=s.max_waiting,
        max_model_len=max_model_len,
        max_drafts=config.speculation.max_draft_tokens if speculative else 0,
        ahead=config.executor.async_scheduling,
        rule=speculative.rule if speculative else "keyed",
    )


def decode_event(data: list[Any]) -> Event:
    """The event that ``encode_event`` wrote."""
    kind, *rest = data
    match kind:
        case "done":
            empty = np.empty(0, np.int32)
            # Copies: kernels know what may not be written as another type, and would be compiled for it too.
            path_off, path = (np.frombuffer(part, np.int32).copy() for part in rest[3:5])
            return StepDone(rest[0], rest[1], rest[2], empty, empty, path_off, path)
        case "fault":
            return StepFault(rest[0], rest[1], np.frombuffer(rest[2], np.int32), rest[3])
        case "arrive":
            return Arrive(_request(rest[1]), Wait(rest[0]))
        case "abort":
            return Abort(rest[0])
        case "waited":
            return Waited(rest[0], Wait(rest[1]), tuple(rest[2]) if rest[2] else None)
        case "annotate":
            return Annotate(*rest)
        case "prioritise":
            return Prioritise(*rest)
        case "drain":
            return Drain()
        case "resetcache":
            return ResetCache()
    return Tick()


def _ids(value: bytes | int) -> np.ndarray:
    return np.zeros(value, np.int32) if isinstance(value, int) else np.frombuffer(value, np.int32)


def _request(d: dict[str, Any]) -> Request:
    sampling = SamplingParams(
        n=d["n"], max_tokens=d["max_tokens"], min_tokens=d["min_tokens"], prompt_logprobs=d["prompt_logprobs"], thinking_budget=d["thinking"][0]
    )
    extras = {"flags": d["flags"] & int(Flag.STOP_STRINGS | Flag.GRAMMAR)}
    if d["thinking"][1] is not None:
        extras["thinking_end_id"] = d["thinking"][1]
    return Request(
        id=d["id"],
        prompt=_ids(d["prompt"]),
        emitted=_ids(d["emitted"]),
        sampling=sampling,
        arrival=d["arrival"],
        kind=Kind(d["kind"]),
        model=d["model"],
        tenant=d["tenant"],
        salt=d["salt"],
        adapter=d["adapter"],
        priority=d["priority"],
        due_first=d["due"][0],
        due_each=d["due"][1],
        due_end=d["due"][2],
        program=d["program"],
        sink=d["sink"],
        draft=d["draft"],
        accept=d.get("accept", "keyed"),
        extras=extras,
    )
