"""Preemption, hangs, device and storage failures, and rewinds after a spike."""
