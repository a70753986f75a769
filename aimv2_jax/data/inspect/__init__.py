"""Contact sheets of a prepared dataset or of a training batch. `python -m aimv2_jax.data.inspect --help`."""
