"""How far to guess ahead: one file per policy, plain data and numpy, no torch, so that a simulator runs the same object.

``fixed`` (a number), ``goodput`` (SmartSpec's one length per batch), ``marginal`` (every node of the batch on its own merit).
"""

from presage.draft.length.registry import LENGTHS, make_length

__all__ = ["LENGTHS", "make_length"]
