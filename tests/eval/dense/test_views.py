"""Windows of images and maps, and the features of their patches."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from aimv2_jax import load_encoder
from aimv2_jax.errors import UserError
from aimv2_jax.eval.dense.dataset import read_dense_dataset
from aimv2_jax.eval.dense.features import DenseEncoder, parse_layers
from aimv2_jax.eval.dense.predict import Predictor
from aimv2_jax.eval.dense.settings import SEGMENTATION, SETTINGS, DenseConfig
from aimv2_jax.eval.dense.views import Packer, map_at, pixels_at, train_batches, train_window
from aimv2_jax.eval.dense.windows import Window
from aimv2_jax.pretrained.encoder import encoder_of
from aimv2_jax.pretrained.images import open_image
from aimv2_jax.pretrained.source import open_weights
from tests.helpers.trained_run import disc_image

CONFIG = DenseConfig(SEGMENTATION, steps=2, batch_size=3, scale_range=(0.4, 2.0))


@pytest.fixture(scope="module")
def encoder(workdir):
    """For crops of 4 x 6 patches of 8 pixels."""
    return DenseEncoder(load_encoder(workdir), (4, 6))


@pytest.fixture(scope="module")
def native(workdir):
    """For whole images in at most 24 patches."""
    weights = open_weights(workdir)
    spec = dataclasses.replace(weights.spec, position="sincos", area=24)
    return DenseEncoder(encoder_of(dataclasses.replace(weights, spec=spec, shapes=spec.shapes())), spec.grid)


def striped():
    """An image of wide stripes, in which the red of a pixel is ten times its label."""
    labels = np.zeros((96, 150), np.uint8)
    labels[:, 30:75], labels[40:, 75:120], labels[60:, 110:] = 8, 16, 24
    return labels, open_image(np.stack([labels * 10, labels * 0 + 100, labels * 0], axis=-1))


@pytest.mark.parametrize("kind", ["encoder", "native"])
def test_map_stays_with_its_image(kind, request):
    """In random windows, mirrored, enlarged and reduced, the map has the label that the colour tells."""
    dense, (labels, image) = request.getfixturevalue(kind), striped()
    mirrored, grids = set(), set()
    for example in range(20):
        window = train_window(labels, dense, CONFIG, example)
        truth, pixels = map_at(labels, window, 8), pixels_at(image, window, dense)
        assert truth.shape == pixels.shape[:2] == (8 * window.grid[0], 8 * window.grid[1])
        agree = np.abs(pixels[..., 0].astype(int) - 10 * truth.astype(int)) < 40  # Half of the least step.
        assert agree.mean() > 0.93  # All but the pixels at the edges of stripes.
        mirrored.add(window.mirrored)
        grids.add(window.grid)
        assert window == train_window(labels, dense, CONFIG, example)
    assert mirrored == {True, False}
    assert len(grids) > 1 if kind == "encoder" else grids == {(4, 6)}


def test_crop_is_drawn_again_for_one_class(encoder):
    """With a limit on the share of a class, crops of a large background have more of the rest."""
    labels = np.zeros((200, 300), np.uint8)
    labels[:100, :150] = 1
    limited = dataclasses.replace(CONFIG, max_class_share=0.75, scale_range=(2.0, 2.0))
    mixed = []
    for config in (dataclasses.replace(limited, max_class_share=1.0), limited):
        windows = [train_window(labels, encoder, config, example) for example in range(40)]
        shares = np.array([map_at(labels, window, 8).mean() for window in windows])
        mixed.append(((shares > 0.25) & (shares < 0.75)).mean())
    assert mixed[1] > 0.85 and mixed[0] < 0.6


def test_region_limits_train_crops(encoder):
    """With NYUv2's settings crops keep out of the borders, and keep the pixels' scale."""
    config = dataclasses.replace(SETTINGS["nyuv2"], flip=0.0)
    for example in range(20):
        left, top, right, bottom = train_window(np.zeros((480, 640)), encoder.at((52, 68)), config, example).box
        assert left >= 43 - 1e-6 and top >= 45 - 1e-6 and right <= 608 + 1e-6 and bottom <= 472 + 1e-6
        assert (right - left, bottom - top) == pytest.approx((544, 416))


def test_partial_window_stays_at_its_place(encoder):
    """The patches of a window with a smaller grid are the valid ones, in their row and column."""
    pixels = np.random.default_rng(0).integers(256, size=(16, 40, 3), dtype=np.uint8)
    window = Window((0, 0, 40, 16), (2, 5))
    batch = Packer(encoder, (4, 6))([window], [pixels], [np.ones((16, 40), np.uint8)], 8)
    valid = batch["valid"].reshape(8, 4, 6)
    assert valid[0, :2, :5].all() and valid.sum() == 10
    patches = batch["patches"].reshape(8, 4, 6, 8, 8, 3)
    np.testing.assert_array_equal(patches[0, 1, 4], pixels[8:, 32:])
    assert batch["coords"].reshape(8, 4, 6, 2)[0, 1, 4].tolist() == [1, 4]
    assert (batch["truth"][0, :16, :40] == 1).all() and (batch["truth"] == 1).sum() == 640


def test_train_batches_are_reproducible(encoder, dense_data):
    """Two runs have the same batches; an epoch has each image once."""
    train = read_dense_dataset(str(dense_data / "discs/train"), "--train", "mask", CONFIG)
    config = dataclasses.replace(CONFIG, steps=8, scale_range=(0.1, 0.1))  # Whole images.
    runs = [list(train_batches(train, encoder, config, 8)) for _ in range(2)]
    for first, second in zip(*runs):
        assert first.keys() == {"patches", "coords", "valid", "grids", "truth"}
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name])
    means = {batch["patches"][row].astype(int).sum() for batch in runs[0] for row in range(3)}
    assert len(means) == 24


def test_device_resize_changes_no_pixel(encoder, dense_data):
    """Patches of train batches, and features of test windows of one and of several an image, are bitwise the same."""
    train = read_dense_dataset(str(dense_data / "discs/train"), "--train", "mask", CONFIG)
    on_devices = dataclasses.replace(encoder, encoder=dataclasses.replace(encoder.encoder, device_resize=True))
    patches, kept = jax.jit(on_devices.patches), set()
    for ours, expected in zip(*(train_batches(train, dense, CONFIG, 8) for dense in (on_devices, encoder))):
        assert "patches" not in ours and ours["unresized"]["pixels"].shape == (8, 48, 72, 3)
        np.testing.assert_array_equal(patches(ours), expected["patches"])
        kept |= {bool(weights[:, 1:].any()) for weights in ours["unresized"]["columns_weights"][:3]}
    assert kept == {True, False}  # Images that the host resized, and that the devices resize.
    config = dataclasses.replace(CONFIG, scales=(1.0, 1.6), flip_test=True)
    found, expected = (Predictor(dense, None, config, (4, 6), 8).load(train[0])[1] for dense in (on_devices, encoder))
    assert [windows for windows, _ in found] == [windows for windows, _ in expected]
    assert max(len(windows) for windows, _ in found) > 1
    batches = []
    for dense, views in ((on_devices, found), (encoder, expected)):
        windows, pixels = ([item for view in views for item in view[part]] for part in (0, 1))
        batches.append(Packer(dense, (4, 6))(windows, pixels, (), 24))
    np.testing.assert_array_equal(patches(batches[0]), batches[1]["patches"])


def test_features_at_another_grid_and_of_layers(workdir, encoder):
    """At a square grid features are those of load_encoder; of blocks, each after the final norm, the last equals it."""
    images = [Image.fromarray(disc_image(number)[0]).crop((0, 0, 64, 64)) for number in range(2)]
    larger = load_encoder(workdir, image_size=48)
    expected = larger(images)
    scale = np.abs(expected).max()
    batch, _ = larger.batch([larger.pixels(image) for image in images], 8)
    square = dataclasses.replace(encoder, layers=(1, 2)).at((6, 6))
    assert (square.width, square.length) == (64, 36)
    found = np.asarray(jax.jit(square.features)(square.params, **batch))[:2]
    np.testing.assert_allclose(found[..., 32:], expected, rtol=0, atol=2e-5 * scale)
    assert np.abs(found[..., :32] - expected).max() > 0.1 * scale
    colours = dataclasses.replace(square, colours=True)
    pixels = np.asarray(jax.jit(colours.features)({}, **batch))
    assert colours.width == 192 and pixels.shape == (8, 36, 192)
    restored = pixels[0, 0, :3] * np.array(larger.spec.pixel_std) + np.array(larger.spec.pixel_mean)
    np.testing.assert_allclose(255 * restored, batch["patches"][0, 0, :3], atol=1e-3)


def test_layers_by_name_and_number():
    """Four layers are the quarters of the depth."""
    assert parse_layers("last", 24) is None and parse_layers("four", 24) == (6, 12, 18, 24)
    assert parse_layers("2,5", 6) == (2, 5) and parse_layers("four", 3) == (1, 2, 3)
    for text in ("five", "0,1", "3,7", "2,2", ""):
        with pytest.raises(UserError, match="--layers is unknown"):
            parse_layers(text, 6)
