"""The commands beside ``serve``: importing this module registers them."""

from presage.serve import (
    cli_batch,
    cli_bench,
    cli_draft,
    cli_env,
    cli_eval,
    cli_explain,
    cli_measure,
    cli_profile,
    cli_quantize,
    cli_reproduce,
    cli_simulate,
    cli_top,
)

__all__ = [
    "cli_batch",
    "cli_bench",
    "cli_draft",
    "cli_env",
    "cli_eval",
    "cli_explain",
    "cli_measure",
    "cli_profile",
    "cli_quantize",
    "cli_reproduce",
    "cli_simulate",
    "cli_top",
]
