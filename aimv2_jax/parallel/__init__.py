"""Mesh, sharding rules and collectives, independent of models and data."""
