"""Plain-torch twins of the kernels: the truth they are compared with, and what gradients flow through."""
