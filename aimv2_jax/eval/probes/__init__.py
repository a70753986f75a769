"""Probes: what a frozen encoder's features know of a label. `python -m aimv2_jax.eval.probes --help`."""
