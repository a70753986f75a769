import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.transforms.geometry import patchify
from aimv2_jax.eval.plots import image_cards, image_grid
from aimv2_jax.eval.visualize import main, predictions_figure, read_examples
from aimv2_jax.pretrained.model import load


@pytest.fixture(scope="module")
def loaded(workdir):
    return load(str(workdir))


def images(figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def test_main_writes_three_images(workdir, tmp_path, capsys):
    """Given a checkpoint, the command writes three images and prints their paths."""
    assert main(["--checkpoint", f"{workdir}:last", "--output", str(tmp_path / "new"), "--examples", "3"]) == 0
    names = [tmp_path / "new" / f"{name}.png" for name in ("predictions", "captions", "curves")]
    assert capsys.readouterr().out.split() == [str(name) for name in names]
    for name in names:
        with Image.open(name) as image:
            assert min(image.size) > 400
            assert len(np.unique(np.asarray(image))) > 50


def test_examples_take_the_sources_in_turn(loaded):
    """Examples come from the sources in turn, with all their captions, up to the number of records."""
    examples = read_examples(loaded, loaded.tokenizer(), 4)
    assert examples.captions == [
        {"alt": "blue disc 23", "synthetic": "a picture of a blue disc on white"},
        {"alt": "blue disc 20", "synthetic": "a picture of a blue disc on white"},
        {"alt": "red disc 24", "synthetic": "a picture of a red disc on white"},
        {"alt": "red disc 21", "synthetic": "a picture of a red disc on white"},
    ]
    assert len(read_examples(loaded, loaded.tokenizer(), 9).captions) == 5


def test_predictions_figure_keeps_prefixes(loaded):
    """Given patches stay as they are, and a prediction of zero is drawn flat."""
    examples = read_examples(loaded, loaded.tokenizer(), 1)
    whole, flat, *pairs = [patchify(image, 8) for image in images(predictions_figure(loaded, examples))]
    np.testing.assert_array_equal(whole, examples.batch["patches"][0])
    assert (flat[1:].reshape(15, 64, 3) == flat[1:].reshape(15, 64, 3)[:, :1]).all()
    assert len(pairs) == 6
    for prefix, given, predicted in zip((4, 8, 12), pairs[::2], pairs[1::2]):
        for image in (given, predicted):
            np.testing.assert_array_equal(image[:prefix], whole[:prefix])
        assert not (predicted[prefix:] == whole[prefix:]).all()


def test_image_grid_groups():
    """The columns of a group in an image grid are closer to each other than to other groups."""
    black = [np.zeros((8, 8, 3), np.uint8)] * 2
    groups = [("one", {"a": black}), ("two", {"b": black, "c": black})]
    boxes = [axes.get_position() for axes in image_grid(groups, "heading", "note").axes[::2]]
    assert 0 < boxes[2].x0 - boxes[1].x1 < boxes[1].x0 - boxes[0].x1
    assert boxes[2].x1 < 1


def test_image_cards_dollars_and_long_captions(tmp_path):
    """Captions with dollar signs are drawn literally on image cards, and long captions are cut."""
    text = {"model": "", "true": "from $5_0^{ to $6 " * 20}
    figure = image_cards([np.zeros((8, 8, 3), np.uint8)], [text], "heading", "note")
    figure.savefig(tmp_path / "cards.png")
    shown = [item.get_text() for item in figure.texts]
    assert "(nothing)" in shown and any("$5_0^{" in line and line.endswith(" …") for line in shown)


def test_main_of_an_output_that_is_a_file(workdir, tmp_path, capsys):
    """An output that is a file, or below one, ends with one line and code 2."""
    (tmp_path / "file").write_text("")
    for output in ("file", "file/in/it"):
        assert main(["--checkpoint", str(workdir), "--output", str(tmp_path / output), "--examples", "1"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --output is a file") and error.count("\n") == 1


def test_main_too_many_images(workdir, tmp_path, capsys):
    """A request for more images than can be drawn ends with code 2."""
    with pytest.raises(SystemExit) as stop:
        main(["--checkpoint", str(workdir), "--output", str(tmp_path), "--examples", "1000"])
    assert stop.value.code == 2 and "more than 100" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_main_help_and_missing_flags(arguments, capsys):
    """Help ends with code 0, and a command without flags with code 2; both name --checkpoint."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == (0 if arguments else 2)
    assert "--checkpoint" in "".join(capsys.readouterr())
