"""AIMv2 pre-training in JAX. Importing this touches no backend, no disk and no tensorflow."""

__version__ = "0.1.0"
