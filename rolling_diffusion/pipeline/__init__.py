"""The diffusers-style pipeline."""
