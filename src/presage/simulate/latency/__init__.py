"""Latency models: seconds and joules of a step from its twelve features. One file each; all implement ``core.protocols.LatencyModel``."""
