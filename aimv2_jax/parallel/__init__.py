"""Mesh, sharding rules and processes. Knows nothing of models or data."""
