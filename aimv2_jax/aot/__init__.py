"""Ahead of time: what the TPU compiler says about a run's own train step, without a TPU.

Everything here is a prediction. The parent process holds no jax: it starts children that compile (`worker`), reads what
they leave behind, and does arithmetic on it.
"""
