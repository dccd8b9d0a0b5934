"""The torch executor: batch assembly, the walk over layers, sampling."""
