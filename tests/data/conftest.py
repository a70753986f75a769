"""Fixtures of the data tests."""

import json

import pytest

from tests.helpers.datasets import datasets, make_config, make_dataset, make_record, tokenizer  # noqa: F401
from tests.helpers.tokenizer_files import word_tokenizer


@pytest.fixture
def write_json(tmp_path):
    """Writes a `tokenizer.json` of words with changed keys at its top; returns its path."""

    def write(name="tokenizer.json", **changes):
        path = tmp_path / name
        path.write_text(json.dumps(word_tokenizer() | changes))
        return str(path)

    return write
