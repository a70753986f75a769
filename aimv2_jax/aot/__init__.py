"""Ahead-of-time analysis of a run's own train step by the TPU compiler, without a TPU.

Every figure is a prediction. The parent process does not import jax: it starts subprocesses that compile (`worker`),
parses the files that they write, and computes the figures.
"""
