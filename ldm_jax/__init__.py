"""Latent diffusion models, both stages, from scratch in JAX and Flax."""

__version__ = "0.1.0"
