"""What a model file is made of: linear, norm, rotary, attention, MLP, experts, and how KV is kept."""
