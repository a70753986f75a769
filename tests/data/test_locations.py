"""Where data lies."""

from pathlib import Path

from aimv2_jax.data.locations import locate


def test_package_path_when_located_then_inside_the_package():
    assert (locate("package:data/sample/train/photo") / "dataset.json").is_file()


def test_plain_path_when_located_then_itself_with_home_expanded():
    assert locate("/some/where") == Path("/some/where")
    assert locate("~/some") == Path.home() / "some"


def test_path_when_its_home_is_unknown_then_left_as_it_is():
    assert locate("~nobody-of-this-name/some") == Path("~nobody-of-this-name/some")
