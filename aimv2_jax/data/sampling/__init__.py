"""Batch composition and batch size as pure functions of seed and step."""
