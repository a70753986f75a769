"""Configuration: ml_collections in, frozen dataclasses out, every value checked. Imports no jax."""
