"""``presage reproduce``: papers as recipes that say what is claimed, run it, and print what was measured beside it.

A recipe is ``papers/<slug>/recipe.py`` with a ``RECIPE``; everything it declares or returns is in ``recipe``.
"""

from presage.reproduce.recipe import Claim, Grid, Job, Measured, Panel, Recipe, verdict

__all__ = ["Claim", "Grid", "Job", "Measured", "Panel", "Recipe", "verdict"]
