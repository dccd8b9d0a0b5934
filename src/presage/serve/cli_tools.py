"""The commands beside ``serve``: importing this module registers run-batch, bench and collect-env."""

from presage.serve import cli_batch, cli_bench, cli_env

__all__ = ["cli_batch", "cli_bench", "cli_env"]
