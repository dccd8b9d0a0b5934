"""KV methods: how keys and values are stored, written and attended."""
