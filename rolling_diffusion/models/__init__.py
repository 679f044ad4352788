"""Flux with a noise level per block and with memory, on diffusers' own modules."""
