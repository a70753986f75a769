"""Resolution of data paths."""

from pathlib import Path

from aimv2_jax.storage.paths import resolve_path


def test_package_path_when_located_then_inside_the_package():
    assert (resolve_path("package:data/sample/train/photo") / "dataset.json").is_file()


def test_plain_path_when_located_then_itself_with_home_expanded():
    assert resolve_path("/some/where") == Path("/some/where")
    assert resolve_path("~/some") == Path.home() / "some"


def test_path_when_its_home_is_unknown_then_left_as_it_is():
    assert resolve_path("~nobody-of-this-name/some") == Path("~nobody-of-this-name/some")
