"""The prepare command inside a test: its result, its refusals, and the records that it wrote."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from aimv2_jax.data.records import Record, decode
from aimv2_jax.data.sources import Source
from aimv2_jax.prepare.__main__ import main

Result = tuple[int, str, Path]
"""Exit code, printed text, and output folder."""


@pytest.fixture
def run_prepare(tmp_path, capsys) -> Callable[..., Result]:
    def run(given: object, *flags: object, output: str = "out") -> Result:
        """Prepares `given` in the test's folder `output`, by one worker."""
        capsys.readouterr()
        folder = tmp_path / output
        code = main(["--input", str(given), "--output", str(folder), "--workers", "1", *map(str, flags)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out + said.err, folder

    return run


def refused(result: Result) -> str:
    """The printed text, which is one error line."""
    code, said, _ = result
    assert code == 2 and re.fullmatch(r"error: .*\.\n", said), said
    return said


def records_of(folder: Path) -> list[Record]:
    """All records of a dataset."""
    source = Source("set", str(folder))
    return [decode(source.read(i)) for i in range(len(source))]
