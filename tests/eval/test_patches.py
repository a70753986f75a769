import jax.numpy as jnp
import numpy as np

from aimv2_jax.eval.reconstruction import denormalise, fade_hidden, fill_predictions
from aimv2_jax.train.losses import normalise_pixels, patch_targets

MEAN, STD, EPS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1e-6


def random_patches() -> np.ndarray:
    patches = np.random.default_rng(0).integers(0, 256, (9, 48), np.uint8)
    patches[3] = 255  # Flat: its variance comes only from the channels' different means and scales.
    patches[4] = 0
    patches[5] = np.tile([200, 10, 30], 16)
    return patches


def test_denormalise_when_the_prediction_is_the_target_then_the_picture_itself():
    patches = random_patches()
    pixels = normalise_pixels(jnp.asarray(patches)[None], jnp.ones((1, 9), bool), MEAN, STD)
    targets = np.asarray(patch_targets(pixels, EPS)[0])
    np.testing.assert_array_equal(denormalise(targets[1:], patches, MEAN, STD, EPS), patches)


def test_denormalise_when_the_prediction_is_zero_then_nothing_of_a_patch_but_one_value():
    flat = denormalise(np.zeros((8, 48)), random_patches(), MEAN, STD, EPS)[1:]
    # Zero is one pixel value per channel, the same all over the patch.
    assert (flat.reshape(8, 16, 3) == flat.reshape(8, 16, 3)[:, :1]).all()


def test_completed_and_seen_when_given_a_prefix_then_it_stays_and_the_rest_is_replaced():
    patches, predicted = random_patches(), random_patches()[::-1]
    np.testing.assert_array_equal(fill_predictions(patches, predicted, 4), np.concatenate([patches[:4], predicted[4:]]))
    shown = fade_hidden(patches, 4)
    np.testing.assert_array_equal(shown[:4], patches[:4])
    assert np.abs(shown[4:].astype(int) - 200).max() <= 24
