"""Errors of the kernels' Python side. Kernels themselves never raise: everything is checked before they start."""

from __future__ import annotations

from presage.core.errors import PresageError


class KernelArgumentError(PresageError, ValueError):
    """A tensor handed to a kernel has the wrong shape, type, stride or address: a bug of the caller, not of a request."""

    code = "kernel_argument"
