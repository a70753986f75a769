"""Attentive, linear and k-NN probes of a frozen encoder. `python -m aimv2_jax.eval.probes --help`."""
