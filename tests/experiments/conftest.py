"""Fixtures: small prepared datasets and configs over them."""

from tests.helpers.datasets import make_dataset, make_record  # noqa: F401
