"""Fixtures: small prepared datasets and configs over them."""

from tests.helpers.datasets import datasets, make_config, make_dataset, make_record, tokenizer  # noqa: F401
