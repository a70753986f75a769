"""Distillation: losses against numpy, a teacher that stays as it is, gradients, resolutions and refused configs."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aimv2_jax.errors import UserError
from aimv2_jax.monitoring.flops import flops_per_example
from aimv2_jax.monitoring.model_flops import flops_of_allowed_pairs
from aimv2_jax.train import distill_losses, losses
from aimv2_jax.train.builder import build_setup
from aimv2_jax.train.distill_task import TEACHER, DistillTask
from aimv2_jax.train.task import run_key
from aimv2_jax.train.tasks import build_task
from tests.helpers.golden_names import paths
from tests.helpers.tiny import TASKS, tiny_config
from tests.train.test_task import batch_of

# A teacher of the student's own sizes (tests/helpers/tiny.py).
SAME_SIZES = {f"distill__encoder__{key}": n for key, n in dict(width=32, depth=2, heads=2, hidden=64).items()}
SAME_SIZES |= {f"distill__decoder__{key}": n for key, n in dict(width=16, depth=2, heads=2, hidden=32).items()}
PREFIX = np.array([1, 2, 3, 2])


def distill_config(**changes):
    return tiny_config(**TASKS["distill"] | changes)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def expected_features(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, kind: str) -> float:
    student, teacher = student.astype(np.float64), teacher.astype(np.float64)
    if kind == "l2":
        return ((student - teacher) ** 2).mean(axis=-1)[mask].sum()
    norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return (1 - (student * teacher).sum(axis=-1) / norms)[mask].sum()


def expected_logits(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, temperature: float) -> float:
    q, p = (softmax(logits.astype(np.float64) / temperature) for logits in (student, teacher))
    return temperature**2 * (p * np.log(p / q)).sum(axis=-1)[mask].sum()


def expected_pixels(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray) -> float:
    return ((student.astype(np.float64) - teacher) ** 2).mean(axis=-1)[mask[:, 1:]].sum()


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_feature_loss_equals_numpy(kind):
    """The sum over valid patches is that of a float64 formula; rows of zeros have finite gradients."""
    student, teacher, mask = normal(3, 5, 8), normal(3, 5, 8, seed=1), normal(3, 5, seed=2) > 0
    loss = partial(distill_losses.feature_loss_sum, kind=kind)
    actual = loss(*map(jnp.asarray, (student, teacher, mask)))
    assert float(actual) == pytest.approx(expected_features(student, teacher, mask, kind), rel=1e-6)
    zeros = jnp.zeros((1, 2, 8))
    grad = jax.grad(lambda x: loss(x, jnp.asarray(teacher[:1, :2]), jnp.ones((1, 2), bool)))(zeros)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logit_loss_equals_numpy(temperature):
    """The sum over the mask is temperature² times the float64 Kullback-Leibler divergence."""
    student, teacher, mask = 3 * normal(2, 4, 7), 3 * normal(2, 4, 7, seed=1), normal(2, 4, seed=2) > 0
    actual = distill_losses.logit_loss_sum(*map(jnp.asarray, (student, teacher, mask)), temperature)
    assert float(actual) == pytest.approx(expected_logits(student, teacher, mask, temperature), rel=1e-6)


def test_pixel_loss_equals_numpy():
    """Row i - 1 of both predictions counts where patch i does."""
    student, teacher, mask = normal(2, 3, 6), normal(2, 3, 6, seed=1), normal(2, 4, seed=2) > -0.5
    actual = distill_losses.pixel_loss_sum(*map(jnp.asarray, (student, teacher, mask)))
    assert float(actual) == pytest.approx(expected_pixels(student, teacher, mask), rel=1e-6)


@pytest.mark.parametrize(("grid", "new_grid"), [((3, 4), (5, 6)), ((6, 6), (4, 3))])
def test_features_are_resized_as_by_pillow(grid, new_grid):
    """Bilinear with half-pixel centres, antialiased where it shrinks."""
    features = normal(2, grid[0] * grid[1], 3)
    resized = distill_losses.resize_features(jnp.asarray(features), grid, new_grid)
    for example in range(2):
        for channel in range(3):
            image = Image.fromarray(features[example, :, channel].reshape(grid))
            expected = np.asarray(image.resize(new_grid[::-1], Image.Resampling.BILINEAR))
            np.testing.assert_allclose(resized[example, :, channel].reshape(new_grid), expected, atol=2e-6)


def test_prefix_keeps_its_share_on_another_grid():
    """The whole image stays the whole image, and no prefix is empty."""
    prefix = jnp.asarray([1, 2, 8, 16])
    np.testing.assert_array_equal(distill_losses.resize_prefix(prefix, 16, 36), [2, 5, 18, 36])
    np.testing.assert_array_equal(distill_losses.resize_prefix(prefix, 16, 4), [1, 1, 2, 4])


def random_params(task):
    """Noise of the right shapes, without compiling the initialisation."""
    rng = np.random.default_rng(0)
    shapes = task.abstract_params
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)


@dataclasses.dataclass(frozen=True)
class Computed:
    """A batch whose last row is padding, both models' features and predictions, losses, and the teacher's gradient."""

    task: DistillTask
    params: dict
    batch: dict
    student: tuple
    teacher: tuple
    own: dict
    loss: dict
    grads: dict


@pytest.fixture(scope="module")
def computed() -> Computed:
    task = build_task(distill_config())
    params, batch, prefix = random_params(task), batch_of(4), jnp.asarray(PREFIX)
    for name in ("valid", "token_valid"):
        batch[name] = batch[name].at[3].set(False)

    def outputs(model, params):
        inputs = task.student.normalise(batch), batch["coords"], batch["valid"], batch["tokens"], prefix
        return model.apply({"params": params}, *inputs, ("pixels", "logits"), method="features_and_predictions")

    def against_teacher(params):
        sums = task.loss_sums(params, batch, prefix)
        return sums["features"] + sums["logits"] + sums["pixels"]

    @jax.jit
    def compute(params):
        student = {name: params[name] for name in ("encoder", "decoder")}
        return (
            outputs(task.student.model, student),
            outputs(task.teacher, params[TEACHER]),
            task.student.loss(student, batch, prefix),
            task.loss(params, batch, prefix),
            jax.grad(against_teacher)(params),
        )

    return Computed(task, params, batch, *jax.device_get(compute(params)))


def test_losses_are_those_of_both_models(computed):
    """Student and teacher run alone under the same prefix, and numpy on their outputs, give every sum and count."""
    task, valid = computed.task, np.asarray(computed.batch["valid"])
    (features, ours), (target, theirs) = computed.student, computed.teacher
    mapped = features @ np.asarray(computed.params["feature_map"]["kernel"])
    text = np.asarray(task.student.text_loss_mask(computed.batch))
    image = np.asarray(losses.image_loss_mask(jnp.asarray(PREFIX), computed.batch["valid"]))
    expected = {
        "features": (expected_features(mapped, target, valid, "cosine"), valid.sum()),
        "logits": (expected_logits(ours.logits, theirs.logits, text, task.temperature), text.sum()),
        "pixels": (expected_pixels(ours.pixels, theirs.pixels, image), image.sum()),
        **computed.own,
    }
    assert computed.loss.keys() == task.weights.keys() == expected.keys()
    for name, (total, count) in expected.items():
        # Logarithms of 1/1024 are rounded by 5e-7, and the divergence is a small difference of them.
        tolerance = 2e-6 * max(float(total), float(count))
        assert float(computed.loss[name].sum) == pytest.approx(float(total), rel=0, abs=tolerance), name
        assert int(computed.loss[name].count) == int(count) > 0


def test_gradient_is_of_the_student_alone(computed):
    """The losses against the teacher move every part of the student, and nothing of the teacher."""
    for path, grad in paths(computed.grads).items():
        assert bool(grad.any()) == (not path.startswith("teacher/")), path


def test_student_equal_to_its_teacher_loses_nothing():
    """All three losses and their gradients are 0 where the student is the teacher, through the initial feature map."""
    task = build_task(distill_config(**SAME_SIZES, distill__own=0.0))
    assert task.weights.keys() == {"features", "logits", "pixels"}
    params = random_params(task)
    params["feature_map"] = jax.jit(lambda rng: task.init(rng)["feature_map"])(run_key(0))
    params[TEACHER] = {name: params[name] for name in ("encoder", "decoder")}
    batch, prefix = batch_of(4), jnp.asarray(PREFIX)
    loss = jax.jit(jax.value_and_grad(lambda params: sum(task.loss_sums(params, batch, prefix).values())))
    total, grads = loss(params)
    # XLA fuses the forward pass that has a gradient in another way, so the two differ by rounding.
    assert abs(float(total)) < 1e-5
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-5


def test_teacher_sees_its_own_resolution():
    """Its larger image under a prefix with the same share; its features are compared on the student's grid."""
    config = distill_config(distill__image_size=56, distill__pixels=0.0, distill__logits=0.0, distill__own=0.0)
    task = build_task(config)
    params, batch, prefix = random_params(task), batch_of(4), jnp.asarray(PREFIX)
    larger = batch_of(4, seed=1, length=16)
    teacher = partial(task.teacher.apply, {"params": params[TEACHER]}, method="features_and_predictions")
    student = partial(task.student.model.apply, {"params": {"encoder": params["encoder"]}})
    inputs = [task.student.normalise(each) for each in (batch, larger)]

    @jax.jit
    def compute():
        at_56 = larger["coords"], larger["valid"], batch["tokens"], 4 * prefix
        at_28 = batch["coords"], batch["valid"], batch["tokens"], prefix
        return (
            student(inputs[0], *at_28, (), method="features_and_predictions")[0],
            distill_losses.resize_features(teacher(inputs[1], *at_56, ())[0], (4, 4), (2, 2)),
            task.loss(params, batch | {"teacher_patches": larger["patches"]}, prefix)["features"],
        )

    features, target, (total, count) = jax.device_get(compute())
    mapped = features @ np.asarray(params["feature_map"]["kernel"])
    expected = expected_features(mapped, target, np.ones((4, 4), bool), "cosine")
    assert float(total) == pytest.approx(expected, rel=2e-6) and int(count) == 16


def test_native_batches_of_any_area_are_distilled():
    """A teacher with sin-cos positions sees the student's own patches, of which the valid ones count."""
    changes = dict(data__areas=(4, 16), model__encoder__position="sincos", distill__encoder__position="sincos")
    task = build_task(distill_config(**changes))
    for length in (4, 16):
        batch = batch_of(2, length=length)
        batch["valid"] = batch["valid"].at[1, 3:].set(False)
        prefix = jnp.asarray([2, 1])
        assert int(task.counts(batch, prefix)["features"]) == length + 3
        losses_by_name = jax.eval_shape(task.loss, task.abstract_params, batch, prefix)
        assert losses_by_name.keys() == task.weights.keys()


def test_state_keeps_no_moments_of_the_teacher():
    """Optimiser and average have the student's tensors only."""
    state = build_setup(distill_config(optimizer__ema_decay=0.9)).abstract_state
    assert set(state.params) == {"encoder", "decoder", "feature_map"} == set(state.ema_params)
    assert set(state.frozen) == {TEACHER}
    assert set(state.opt_state[1].mu) == set(state.opt_state[1].nu) == set(state.params)


def test_teacher_has_only_what_its_losses_need():
    """A decoder is left out without its losses, and a head or a token table without its own."""

    def teacher(**weights):
        config = distill_config(**{f"distill__{name}": weight for name, weight in weights.items()})
        return build_task(config).abstract_params[TEACHER]

    assert set(teacher(logits=0.0, pixels=0.0)) == {"encoder"}
    assert not {"pixel_head"} & set(teacher(logits=1.0, pixels=0.0)["decoder"])
    assert not {"token_head", "token_table", "begin", "position"} & set(teacher(logits=0.0, pixels=1.0)["decoder"])


def test_flops_count_the_teacher_once():
    """A teacher of the student's sizes adds a forward pass, a third of the student's cost, and the feature map."""
    alone, config = tiny_config(), distill_config(**SAME_SIZES)
    feature_map = 6 * config.num_patches * 32 * 32
    for flops in (flops_per_example, flops_of_allowed_pairs):
        assert flops(config) == pytest.approx(flops(alone) * 4 / 3 + feature_map)
    larger = distill_config(**SAME_SIZES, distill__pixels=0.0, distill__image_size=56)
    without = distill_config(**SAME_SIZES, distill__pixels=0.0)
    assert flops_per_example(larger) > flops_per_example(without)


REFUSED = {
    "no path": (dict(distill__path=""), "distill.path names no teacher"),
    "no weight": (
        dict(distill__features=0.0, distill__logits=0.0, distill__pixels=0.0),
        "are all 0, and nothing would be learnt from the teacher",
    ),
    "negative": (dict(distill__own=-1.0), "distill.own is too small: -1.0"),
    "cold": (dict(distill__temperature=0.0), "distill.temperature must be above zero"),
    "patches": (dict(distill__image_size=30), "distill.image_size is not a multiple of model.patch_size.*Use for"),
    "pixels of others": (dict(distill__image_size=56), "distill.pixels compares patches"),
    "teacher trained": (dict(init__reinit=("teacher/encoder",)), "init.reinit names the teacher"),
    "no decoder": (dict(distill__decoder=None), "distill.pixels needs a teacher with a decoder"),
    "patch head": (
        dict(distill__decoder__kind="mlp", distill__decoder__width=32),
        "distill.decoder.kind is a patch head, which predicts no text",
    ),
    "native, learned": (
        dict(data__areas=(4, 8), model__encoder__position="sincos"),
        "data.areas needs a teacher whose position embeddings accept any grid",
    ),
    "native, crops": (
        dict(
            data__areas=(4, 8),
            model__encoder__position="sincos",
            distill__encoder__position="sincos",
            distill__image_size=56,
            distill__pixels=0.0,
        ),
        "distill.image_size gives the teacher crops",
    ),
    "full attention": (
        dict(model__encoder__attention_mask="full", loss__image=False),
        "distill.pixels needs patches that the encoder does not see",
    ),
    "dropped tokens": (
        dict(model__decoder__token_keep_rate=0.5, loss__image=False),
        "token_keep_rate drops tokens that distill.pixels needs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_that_cannot_distil_is_refused(case):
    """One sentence for each, when the config is read."""
    changes, message = REFUSED[case]
    settings = dict(TASKS["distill"])
    if changes.get("distill__decoder", ...) is None:
        settings = {key: value for key, value in settings.items() if not key.startswith("distill__decoder__")}
    with pytest.raises(UserError, match=message):
        tiny_config(**settings | changes)
