"""One file per scheduling policy; the file's class is found by name, and other packages may add theirs through an entry point."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, signature
from typing import Any

from presage.core.config import SchedulerConfig
from presage.core.errors import ConfigError
from presage.core.protocols import Scheduler

POLICIES = {
    "fcfs": "presage.schedule.fcfs:Fcfs",
    "priority": "presage.schedule.priority:Priority",
    "sarathi": "presage.schedule.sarathi:Sarathi",
    "splitfuse": "presage.schedule.splitfuse:SplitFuse",
    "layered": "presage.schedule.layered:Layered",
    "splits": "presage.schedule.splits:Splits",
    "ltr": "presage.schedule.ltr:Ltr",
    "shortest": "presage.schedule.shortest:Shortest",
    "fair": "presage.schedule.fair:Fair",
    "deadline": "presage.schedule.deadline:Deadline",
    "cache_aware": "presage.schedule.cache_aware:CacheAware",
    "budget": "presage.schedule.budget:KVForecast",
}


def make_scheduler(config: SchedulerConfig) -> Scheduler:
    """The policy named in the configuration, with its dials. Raises ConfigError listing the known names, or the policy's dials."""
    name = config.scheduling_policy
    known = dict(POLICIES) | {e.name: e.value for e in entry_points(group="presage.schedulers")}
    if name not in known:
        raise ConfigError(f"unknown scheduling policy {name!r}; known: {', '.join(sorted(known))}", param="scheduling_policy")
    module, _, attribute = known[name].partition(":")
    make = getattr(import_module(module), attribute)
    dials = parse_dials(config.scheduling_config)
    strange = set(dials) - set(dials_of(make))
    if strange:
        have = ", ".join(dials_of(make)) or "none"
        raise ConfigError(f"scheduling policy {name!r} has no dial {', '.join(sorted(strange))}; it has: {have}", param="scheduling_config")
    try:
        policy: Scheduler = make(config, **dials)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scheduling policy {name!r}: {error}", param="scheduling_config") from None
    return policy


def dials_of(make: Any) -> dict[str, Any]:
    """A policy's dials and their defaults: the arguments after the configuration."""
    found = list(signature(make).parameters.values())[1:]
    return {p.name: p.default for p in found if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}


def parse_dials(value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """What ``scheduling_config`` says. Raises ConfigError unless it is a JSON object."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"scheduling_config is no JSON: {error}", param="scheduling_config") from None
    if value and not isinstance(value, Mapping):
        raise ConfigError("scheduling_config must be a JSON object", param="scheduling_config")
    return dict(value) if isinstance(value, Mapping) else {}
