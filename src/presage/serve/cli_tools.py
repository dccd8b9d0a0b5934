"""The commands beside ``serve``: importing this module registers run-batch, bench, eval, profile, quantize and collect-env."""

from presage.serve import cli_batch, cli_bench, cli_draft, cli_env, cli_eval, cli_profile, cli_quantize

__all__ = ["cli_batch", "cli_bench", "cli_draft", "cli_env", "cli_eval", "cli_profile", "cli_quantize"]
