"""Ahead-of-time analysis of a run's own train step by the TPU compiler, without a TPU. Every figure is a prediction.

The parent process starts no JAX backend: its subprocesses compile (`worker`), and it parses the files that they write.
"""
