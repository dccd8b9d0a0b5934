"""Measured here, wanted there: a latency model times the ratio of two rooflines (another device, another degree of tensor parallelism).

What was measured keeps what no roofline knows (kernels, host), and the rooflines say only by how much the other machine differs.
"""

from __future__ import annotations

from presage.core.plan import Facts
from presage.core.protocols import LatencyModel
from presage.core.types import Floats
from presage.simulate.latency.roofline import Roofline


class Transferred:
    """Implements ``core.protocols.LatencyModel``: ``base`` scaled by ``there`` / ``here``, step by step; joules are those of ``there``."""

    def __init__(self, base: LatencyModel, here: Roofline, there: Roofline) -> None:
        self.base, self.here, self.there = base, here, there
        self.version = f"{getattr(base, 'version', type(base).__name__)}, transferred: {here.version} -> {there.version}"

    def predict(self, features: Floats) -> Floats:
        """(seconds, joules) [m, 2], seconds rounded to a microsecond."""
        out, here, there = self.base.predict(features), self.here.predict(features), self.there.predict(features)
        out[:, 0] = (out[:, 0] * there[:, 0] / here[:, 0]).round(6)
        out[:, 1] = there[:, 1] * out[:, 0] / there[:, 0]
        return out

    def observe(self, facts: Facts) -> None:
        """Passed on to what was measured."""
        self.base.observe(facts)
