"""One file per scheduling policy; the file's class is found by name, and other packages may add theirs through an entry point."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from presage.core.config import SchedulerConfig
from presage.core.errors import ConfigError
from presage.core.protocols import Scheduler

POLICIES = {
    "fcfs": "presage.schedule.fcfs:Fcfs",
    "priority": "presage.schedule.priority:Priority",
    "layered": "presage.schedule.layered:Layered",
}


def make_scheduler(config: SchedulerConfig) -> Scheduler:
    """The policy named in the configuration. Raises ConfigError listing the known names."""
    known = dict(POLICIES) | {e.name: e.value for e in entry_points(group="presage.schedulers")}
    if config.scheduling_policy not in known:
        raise ConfigError(f"unknown scheduling policy {config.scheduling_policy!r}; known: {', '.join(sorted(known))}", param="scheduling_policy")
    module, _, name = known[config.scheduling_policy].partition(":")
    policy: Scheduler = getattr(import_module(module), name)(config)
    return policy
