"""Next-patch predictions as images: the inverse of the targets, and the images shown."""

import jax.numpy as jnp
import numpy as np

from aimv2_jax.eval.reconstruction import denormalise, fade_hidden, fill_predictions
from aimv2_jax.train.losses import normalise_pixels, patch_targets

MEAN, STD, EPS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1e-6


def random_patches() -> np.ndarray:
    patches = np.random.default_rng(0).integers(0, 256, (9, 48), np.uint8)
    patches[3] = 255  # One colour: its normalised values differ only by channel.
    patches[4] = 0
    patches[5] = np.tile([200, 10, 30], 16)
    return patches


def test_denormalise_inverts_the_targets():
    """Predictions that equal the targets give the original patches."""
    patches = random_patches()
    pixels = normalise_pixels(jnp.asarray(patches)[None], jnp.ones((1, 9), bool), MEAN, STD)
    targets = np.asarray(patch_targets(pixels, EPS)[0])
    np.testing.assert_array_equal(denormalise(targets[1:], patches, MEAN, STD, EPS), patches)


def test_denormalise_of_zeros_is_one_colour():
    """A prediction of zeros gives one value per channel in the whole patch."""
    flat = denormalise(np.zeros((8, 48)), random_patches(), MEAN, STD, EPS)[1:]
    assert (flat.reshape(8, 16, 3) == flat.reshape(8, 16, 3)[:, :1]).all()


def test_fill_predictions_and_fade_hidden():
    """Both keep the prefix. The other patches are predictions, or nearly grey (200)."""
    patches, predicted = random_patches(), random_patches()[::-1]
    np.testing.assert_array_equal(fill_predictions(patches, predicted, 4), np.concatenate([patches[:4], predicted[4:]]))
    shown = fade_hidden(patches, 4)
    np.testing.assert_array_equal(shown[:4], patches[:4])
    assert np.abs(shown[4:].astype(int) - 200).max() <= 24
