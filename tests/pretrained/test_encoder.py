"""`load_encoder` with images of any type and size."""

import dataclasses
import io
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aimv2_jax import load_encoder
from aimv2_jax.data.transforms import geometry
from aimv2_jax.errors import UserError
from aimv2_jax.models.position_embeddings import resize_positions
from aimv2_jax.pretrained.encoder import PretrainedEncoder, encoder_of, mirrored
from aimv2_jax.pretrained.images import NamedImage
from aimv2_jax.pretrained.model import load
from aimv2_jax.pretrained.source import open_weights
from aimv2_jax.train.losses import normalise_pixels
from tests.helpers.trained_run import disc_image


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Images of mixed sizes and modes."""
    whole = [Image.fromarray(disc_image(number)[0]) for number in range(3)]
    return [whole[0].resize((90, 40)), whole[1].resize((33, 70)).convert("L"), whole[2].convert("RGBA")]


@pytest.fixture(scope="module")
def encoder(workdir):
    return load_encoder(workdir)


@pytest.fixture(scope="module")
def native(workdir):
    """The same blocks, with sin-cos positions and an area of 20 patches."""
    weights = open_weights(workdir)
    spec = dataclasses.replace(weights.spec, position="sincos", area=20)
    return encoder_of(dataclasses.replace(weights, spec=spec, shapes=spec.shapes()))


def test_encoder_images_of_mixed_sizes(encoder, workdir, images):
    """Images of mixed sizes give the features of their centre squares."""
    features = encoder(images)
    assert features.shape == (3, 16, 32) and features.dtype == np.float32
    loaded = load(str(workdir))
    patches = np.stack([geometry.patchify(encoder.pixels(image), 8) for image in images])
    valid = jnp.ones((3, 16), bool)
    pixels = normalise_pixels(jnp.asarray(patches), valid, loaded.task.pixel_mean, loaded.task.pixel_std)
    coords = jnp.broadcast_to(geometry.patch_coords((4, 4)), (3, 16, 2))
    expected, _ = loaded.task.model.encoder.apply({"params": loaded.params["encoder"]}, pixels, coords, valid)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_device_resize_changes_no_feature(encoder, images, monkeypatch):
    """Images that the devices resize, or the host for its size or kind, have bitwise the same patches and features."""
    huge = Image.fromarray(disc_image(4)[0]).resize((400, 300))
    mixed = [*images, huge]
    on_devices = dataclasses.replace(encoder, device_resize=True)
    decoded = [on_devices.decoded(image) for image in mixed]
    assert [image.columns.weights.shape[1] > 1 for image in decoded] == [True, True, True, False]
    for flip in (lambda image: image, mirrored):
        ours, grids = on_devices.batch([flip(image) for image in decoded], 6)
        expected, _ = encoder.batch([flip(encoder.pixels(image)) for image in mixed], 6)
        assert grids == [(4, 4)] * 4 and ours.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(ours[name], array)
    expected = encoder(mixed)
    monkeypatch.setattr(PretrainedEncoder, "pixels", None)  # Whoever calls it fails.
    np.testing.assert_array_equal(on_devices(mixed), expected)


def test_encoder_small_batches(encoder, images):
    """Batches smaller than the list of images give the same features in the same order."""
    many = [*images, *images[::-1], *images, *images]
    once = encoder(many, batch_size=16)
    np.testing.assert_array_equal(once[:3], once[3:6][::-1])
    np.testing.assert_allclose(encoder(many, batch_size=8), once, rtol=0, atol=1e-6 * np.abs(once).max())
    assert encoder([]).shape == (0, 16, 32)


def test_encoder_rows_split_over_devices(encoder, images):
    """The rows of a batch are split over the devices."""
    [(batch, grids)] = encoder.batches(images)
    assert jax.device_count() == 8 and len(grids) == 3
    assert batch["patches"].sharding.shard_shape(batch["patches"].shape)[0] == 1
    assert len(encoder.features(**batch).sharding.device_set) == 8


def test_image_as_array_file_or_pillow(encoder, images, tmp_path):
    """An image gives the same features as an array, as a file and as a Pillow image."""
    image = images[0].convert("RGB")
    image.save(tmp_path / "one.png")
    grey = np.asarray(images[1])
    features = encoder([image, np.asarray(image), tmp_path / "one.png", str(tmp_path / "one.png"), images[1], grey])
    for row in (1, 2, 3):
        np.testing.assert_array_equal(features[row], features[0])
    np.testing.assert_array_equal(features[5], features[4])


def test_image_exif_rotation(encoder, images):
    """The encoder sees an image of a turned camera upright."""
    turned = images[0].convert("RGB").transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    np.testing.assert_array_equal(encoder([turned])[0], encoder([images[0].convert("RGB")])[0])


def test_native_encoder_aspect(native, images):
    """The native encoder sees whole images in their aspect ratio."""
    features = native(images)
    assert [features.shape for features in features] == [(3, 6, 32), (6, 3, 32), (4, 4, 32)]
    alone = native(images[:1])[0]
    np.testing.assert_allclose(features[0], alone, rtol=0, atol=1e-6 * np.abs(alone).max())


def test_layer_residual_stream(encoder, images):
    """The features of a requested layer are the residual stream at that layer."""
    [(batch, _)] = encoder.batches(images)
    first, last = (encoder.features(**batch, layer=layer) for layer in (0, encoder.spec.depth))
    scale = encoder.params["encoder"]["trunk"]["norm"]["scale"]
    normed = last * jax.lax.rsqrt(jnp.mean(last**2, -1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(normed, encoder.features(**batch), rtol=0, atol=1e-5)
    assert np.abs(first - last).max() > 0.01


def test_image_size_when_given_then_positions_are_resized(workdir, encoder, images):
    larger = load_encoder(workdir, image_size=48)
    assert larger(images).shape == (3, 36, 32)
    table = resize_positions(encoder.params["encoder"]["position"], (4, 4), (6, 6))
    np.testing.assert_array_equal(larger.params["encoder"]["position"], table)


def test_bfloat16_when_asked_then_features_near(workdir, encoder, images):
    features = load_encoder(workdir, dtype="bfloat16")(images)
    assert features.dtype == jnp.bfloat16
    exact = encoder(images)
    # Two blocks round a dozen times by 2^-9 of what they add up.
    np.testing.assert_allclose(features.astype(np.float32), exact, rtol=0, atol=0.03 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        ({"image_size": 50}, "not a multiple of the patch size 8: 50. Give 48"),
        ({"area": 16}, "area needs a model with sin-cos positions"),
        ({"image_size": 32, "area": 16}, "both given"),
        ({"dtype": "int8"}, "dtype is unknown"),
    ],
)
def test_load_encoder_invalid_options(workdir, ask, sentence):
    """Options that do not fit the encoder raise UserError."""
    with pytest.raises(UserError, match=sentence):
        load_encoder(workdir, **ask)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((4, 4, 3)), "the array is not an image: 'float64 of shape"),
        (np.zeros((4, 4, 5), np.uint8), r"shape \(4, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (3, "not an image: 'int'"),
        (__file__, "not a decodable image: .*test_encoder.py"),
        (NamedImage("set: cat/3", b"none"), "not a decodable image: 'set: cat/3'"),
    ],
)
def test_image_invalid(encoder, image, sentence):
    """A value that is not an image raises UserError."""
    with pytest.raises(UserError, match=sentence):
        encoder([image])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (os.mkfifo, "not a regular file"),
        (os.mkdir, "not a regular file"),
        (lambda path: None, "cannot be read .No such file"),
        (lambda path: path.write_bytes(b"\xff\xd8" + b"\xff\xfe\0\x02" * 9000), "takes too long to decode"),
        (lambda path: Image.new("1", (10_000, 9000)).save(path), "more pixels than the decoder accepts"),
    ],
    ids=["pipe", "folder", "nothing", "costly", "large"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_file_not_decodable(encoder, tmp_path, make, sentence):
    """A file that cannot be decoded raises UserError that names it."""
    make(tmp_path / "x.png")
    with pytest.raises(UserError, match=f"{sentence}.*x.png"):
        encoder([tmp_path / "x.png"])


@pytest.mark.parametrize("one", [np.zeros((8, 8, 3), np.uint8), "one.jpg", Image.new("RGB", (8, 8))])
def test_single_image_for_list(encoder, one):
    """A single image in place of a list raises UserError."""
    with pytest.raises(UserError, match=r"a single image in place of a list.*Give \[image\]"):
        encoder(one)


def test_image_file_cut(encoder, tmp_path):
    """An image whose file is cut raises UserError."""
    file = io.BytesIO()
    Image.fromarray(disc_image(0)[0]).save(file, "PNG")
    cut = file.getvalue()[:-200]
    (tmp_path / "cut.png").write_bytes(cut)
    with Image.open(tmp_path / "cut.png") as lazy:
        for image in (tmp_path / "cut.png", cut, lazy):
            with pytest.raises(UserError, match="not a decodable image"):
                encoder([image])


def test_native_encoder_without_upscaling(native):
    """Small images that are not upscaled give as many patches as they fill."""
    not_upscaled = dataclasses.replace(native, spec=dataclasses.replace(native.spec, upscale=False))
    small = Image.fromarray(disc_image(0)[0]).resize((24, 16))
    assert [encoder([small])[0].shape[:2] for encoder in (native, not_upscaled)] == [(4, 5), (2, 3)]


def test_pooled_without_head(encoder, images):
    """Pooled features of an encoder without a pooled head raise UserError."""
    with pytest.raises(UserError, match="no pooled head"):
        encoder.pooled(images)


@pytest.mark.parametrize("spec", ["nowhere", "{}:30"])
def test_load_encoder_checkpoint_missing(workdir, spec):
    """A checkpoint that does not exist raises UserError."""
    with pytest.raises(UserError, match="--checkpoint"):
        load_encoder(spec.format(workdir))
