"""Batches built in worker processes or threads, ahead of the training step."""
