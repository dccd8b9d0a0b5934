"""Sampling: per-request state, the steps from raw logits to the target, keyed noise, and the sampler that judges a step."""

from presage.execute.sampling.noise import Noise
from presage.execute.sampling.rows import Rows
from presage.execute.sampling.sampler import Judged, Sampler
from presage.execute.sampling.state import SamplingState, check_ids

__all__ = ["Judged", "Noise", "Rows", "Sampler", "SamplingState", "check_ids"]
