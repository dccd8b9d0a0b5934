"""The pure half of the KV cache: which block belongs to whom. No torch, no device; the simulator runs the same code."""
