"""Quantised weights: their neutral form, the schemes that make them, calibrators, and the checkpoint formats of the field."""
