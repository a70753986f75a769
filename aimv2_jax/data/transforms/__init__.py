"""Transforms from encoded images and stored captions to patches and clean text."""
