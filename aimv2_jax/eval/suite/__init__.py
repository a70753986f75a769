"""The paper's fourteen classification sets, and others, in one table. `python -m aimv2_jax.eval.suite --help`."""
