"""Checks of the house rules and generators of the reference pages; run by ``.ci/run``."""
