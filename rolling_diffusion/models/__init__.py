"""Transformers with a noise level per token and with memory: what rolls, a file for each family."""
