"""The commands beside ``serve``: run-batch, bench, collect-env."""
