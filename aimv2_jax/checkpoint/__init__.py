"""Verified checkpoints of the whole training state, with atomic commit and delete."""
