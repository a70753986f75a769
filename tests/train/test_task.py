"""Pre-training task: initialisation, prefixes, losses, masks, and invariance to padding."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aimv2_jax.config.load import load_config
from aimv2_jax.errors import UserError
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.train import losses
from aimv2_jax.train.step import accumulate
from aimv2_jax.train.task import abstract_key, purpose_key, run_key
from aimv2_jax.train.tasks import build_task
from tests.helpers.golden_names import paths
from tests.helpers.tiny import ROOT, tiny_config

LENGTH, TEXT = 4, 12


def batch_of(size: int, seed: int = 0, length: int = LENGTH) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    side = math.isqrt(length)
    coords = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(1, -1, 2)
    batch = {
        "patches": random.integers(0, 256, (size, length, 588), np.uint8),
        "coords": np.broadcast_to(coords, (size, length, 2)).astype(np.int32),
        "valid": np.ones((size, length), bool),
        "tokens": random.integers(0, 1024, (size, TEXT), np.int32),
        "token_valid": np.arange(TEXT) < random.integers(1, TEXT, (size, 1)),
        "example_index": np.stack([np.zeros(size), np.arange(size)], axis=1).astype(np.uint32),
    }
    return jax.tree.map(jnp.asarray, batch)


def test_init_when_drawn_by_the_recipe_then_each_tensor_has_its_distribution():
    """RECIPE.md §5, on a model wide enough to distinguish the distributions."""
    smaller = {"model.encoder.depth": 2, "model.decoder.depth": 3, "model.decoder.vocab_size": 1024}
    smaller |= {"model.encoder.hidden": 512, "model.decoder.hidden": 512}
    config = load_config(ROOT / "experiments/pretrain.py:base", [(key, str(size)) for key, size in smaller.items()])
    params = paths(jax.device_get(jax.jit(build_task(config).init)(run_key(0))))
    depth = config.model.decoder.depth

    def check(path: str, std: float, bound: float):
        leaf = params[path]
        assert abs(float(leaf.std()) / std - 1) < 0.05 and abs(float(leaf.mean())) < 0.05 * std, path
        assert bound * 0.9 < float(abs(leaf).max()) <= bound * 1.0001, path

    def uniform(path: str, bound: float):
        check(path, bound / 3**0.5, bound)

    def xavier(path: str):
        fan_in, fan_out = params[path].shape[-2:]
        uniform(path, (6 / (fan_in + fan_out)) ** 0.5)

    for trunk in ("encoder/trunk", "decoder/trunk"):
        for name in (
            "attention/query",
            "attention/key",
            "attention/value",
            "attention/out",
            "mlp/gate",
            "mlp/up",
            "mlp/down",
        ):
            xavier(f"{trunk}/blocks/{name}/kernel")
        stacked = params[f"{trunk}/blocks/mlp/up/kernel"]
        assert (stacked[0] != stacked[1]).any()  # Every layer is initialised independently.
    xavier("encoder/patch_embed/kernel")
    uniform("encoder/patch_embed/bias", 1 / 588**0.5)
    uniform("decoder/image_embed/kernel", 1 / 768**0.5)
    uniform("decoder/image_embed/bias", 1 / 768**0.5)
    for path, std in {
        "encoder/position": 0.02,
        "decoder/token_table": 0.02,
        "decoder/begin": 0.02,
        "decoder/position": 0.01,
    }.items():
        assert abs(float(params[path].std()) / std - 1) < 0.1, path
    for head in ("pixel_head", "token_head"):
        std = (1 / ((1 + depth) * 1024)) ** 0.5
        check(
            f"decoder/{head}/kernel", std, 2 * std / 0.87962566103423978
        )  # Truncated at two of the untruncated sigmas.
    assert all((leaf == 1).all() for path, leaf in params.items() if path.endswith("scale"))


def test_prefix_when_rows_are_permuted_or_split_then_follows_the_example():
    task, batch = build_task(tiny_config()), batch_of(64, length=256)
    drawn = np.asarray(task.sample_prefix(run_key(3), batch))
    order = np.random.default_rng(0).permutation(64)
    permuted = {name: array[order] for name, array in batch.items()}
    np.testing.assert_array_equal(task.sample_prefix(run_key(3), permuted), drawn[order])
    half = {name: array[32:] for name, array in batch.items()}
    np.testing.assert_array_equal(task.sample_prefix(run_key(3), half), drawn[32:])
    assert (np.asarray(task.sample_prefix(run_key(4), batch)) != drawn).any()


def test_prefix_when_many_are_drawn_then_uniform_from_1_to_one_less_than_the_patches():
    size, length = 20_000, 9
    index = jnp.stack([jnp.arange(size) % 3, jnp.arange(size)], axis=1).astype(jnp.uint32)
    valid = jnp.ones((size, length), bool).at[: size // 2, 5:].set(False)  # Half have 5 patches, half 9.
    drawn = np.asarray(losses.sample_prefix(purpose_key(run_key(0), "prefix"), index, valid))
    for part, patches in ((drawn[: size // 2], 5), (drawn[size // 2 :], 9)):
        counts = np.bincount(part, minlength=patches)
        assert counts[0] == 0 and len(counts) == patches
        expected = len(part) / (patches - 1)
        chi_square = ((counts[1:] - expected) ** 2 / expected).sum()
        assert chi_square < 30  # With 7 degrees of freedom, 1 in 10,000 seeds exceeds 30.


def test_prefix_when_the_high_word_differs_then_another_example():
    index = jnp.asarray([[0, 7], [1, 7]] * 200, jnp.uint32)
    drawn = np.asarray(losses.sample_prefix(run_key(0), index, jnp.ones((400, 256), bool)))
    assert (drawn[::2] == drawn[0]).all() and (drawn[1::2] == drawn[1]).all() and drawn[0] != drawn[1]


def test_prefix_when_an_example_has_one_patch_or_none_then_1_and_nothing_counts():
    valid = jnp.asarray([[True] + [False] * 3, [False] * 4])
    index = jnp.zeros((2, 2), jnp.uint32)
    prefix = losses.sample_prefix(run_key(0), index, valid)
    np.testing.assert_array_equal(prefix, [1, 1])
    assert not losses.image_loss_mask(prefix, valid).any()


@pytest.fixture(scope="module")
def tiny():
    task = build_task(tiny_config(model__encoder__position="sincos"))
    return task, jax.jit(task.init)(run_key(0))


_COMPILED = {}


def gradient(task, params, batch, prefix, parts=1):
    """Returns counts, loss sums and gradients of a batch, by a compiled function that tests of a task share."""

    def run(params, batch, prefix):
        counts = task.counts(batch, prefix)
        return counts, *accumulate(params, batch, prefix, counts, task, parts)

    return _COMPILED.setdefault((id(task), parts), (jax.jit(run), task))[0](params, batch, prefix)


def assert_same_gradient(actual, expected):
    actual, expected = (paths(jax.device_get(tree)) for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        scale = max(float(np.abs(leaf).max()), 1e-12)
        np.testing.assert_allclose(expected[path], leaf, rtol=0, atol=2e-5 * scale, err_msg=path)


def test_batch_when_rows_of_filling_are_added_then_losses_and_gradients_stay(tiny):
    task, params = tiny
    batch, empty = batch_of(4), batch_of(4, seed=1)
    empty |= {name: jnp.zeros_like(empty[name]) for name in ("valid", "token_valid")}
    padded = {name: jnp.concatenate([batch[name], empty[name]]) for name in batch}
    prefix = jnp.asarray([1, 2, 3, 2])
    counts, sums, grads = gradient(task, params, batch, prefix)
    padded_counts, padded_sums, padded_grads = gradient(
        task, params, padded, jnp.pad(prefix, (0, 4), constant_values=1)
    )
    assert jax.tree.map(int, counts) == jax.tree.map(int, padded_counts)
    for name in sums:
        assert float(padded_sums[name]) == pytest.approx(float(sums[name]), rel=2e-6)
    assert_same_gradient(grads, padded_grads)


def test_batch_when_patches_of_padding_are_added_then_losses_and_gradients_stay(tiny):
    """The padding contains noise, which must have no effect."""
    task, params = tiny
    batch, noise = batch_of(4), batch_of(4, seed=1)
    padded = batch | {name: jnp.concatenate([batch[name], noise[name]], axis=1) for name in ("patches", "coords")}
    padded["valid"] = jnp.concatenate([batch["valid"], jnp.zeros_like(noise["valid"])], axis=1)
    prefix = jnp.asarray([1, 2, 3, 2])
    counts, sums, grads = gradient(task, params, batch, prefix)
    padded_counts, padded_sums, padded_grads = gradient(task, params, padded, prefix)
    assert jax.tree.map(int, counts) == jax.tree.map(int, padded_counts)
    for name in sums:
        assert float(padded_sums[name]) == pytest.approx(float(sums[name]), rel=2e-6)
    assert_same_gradient(grads, padded_grads)


def test_batch_when_nothing_counts_then_loss_0_and_finite_gradients(tiny):
    task, params = tiny
    empty = batch_of(4) | {"valid": jnp.zeros((4, LENGTH), bool), "token_valid": jnp.zeros((4, TEXT), bool)}
    counts, sums, grads = gradient(task, params, empty, jnp.ones(4, jnp.int32))
    assert all(int(count) == 0 for count in counts.values()) and float(task.total(sums, counts)) == 0
    assert all(bool((leaf == 0).all()) for leaf in jax.tree.leaves(grads))


def test_batch_when_accumulated_in_parts_then_one_batch(tiny):
    """In four parts of two rows; tests/test_golden.py accumulates row by row."""
    task, params = tiny
    batch, prefix = batch_of(8), jnp.asarray([1, 2, 3, 2, 1, 3, 3, 1])
    _counts, sums, grads = gradient(task, params, batch, prefix)
    _, part_sums, part_grads = gradient(task, params, batch, prefix, parts=4)
    for name in sums:
        assert float(part_sums[name]) == pytest.approx(float(sums[name]), rel=2e-6)
    assert_same_gradient(grads, part_grads)


@pytest.mark.parametrize(("off", "head"), [("image", "pixel_head"), ("text", "token_head")])
def test_loss_when_switched_off_then_not_computed_and_its_head_has_no_gradient(off, head, tiny):
    task = build_task(tiny_config(**{f"loss__{off}": False}, model__encoder__position="sincos"))
    params, batch, prefix = tiny[1], batch_of(2), jnp.asarray([1, 2])
    jax.tree.map(lambda leaf, ours: np.testing.assert_equal(leaf.shape, ours.shape), params, task.abstract_params)
    counts, sums, grads = gradient(task, params, batch, prefix)
    assert off not in counts and off not in sums
    assert not paths(grads)[f"decoder/{head}/kernel"].any()
    assert any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_alpha_when_set_then_weighs_the_image_loss():
    task = build_task(tiny_config(loss__alpha=0.25))
    sums, counts = (
        {"image": jnp.asarray(8.0), "text": jnp.asarray(6.0)},
        {"image": jnp.asarray(4), "text": jnp.asarray(3)},
    )
    assert float(task.total(sums, counts)) == 6 / 3 + 0.25 * 8 / 4


def test_tokens_when_the_end_is_predicted_then_one_more_counts_where_there_is_room():
    token_valid = jnp.asarray([[True, True, False, False], [True] * 4, [False] * 4, [False] * 4])
    is_example = jnp.asarray([True, True, True, False])
    loss_mask = losses.text_loss_mask(token_valid, is_example, predict_eos=True)
    expected = [[True, True, True, False], [True] * 4, [True, False, False, False], [False] * 4]
    np.testing.assert_array_equal(loss_mask, expected)
    np.testing.assert_array_equal(losses.text_loss_mask(token_valid, is_example, predict_eos=False), token_valid)


def test_caption_empty_then_its_end_counts(tiny):
    """The end of an empty caption is scored, but not that of a padding row, which has the same tokens and prefix."""
    task, params = tiny
    batch, prefix = batch_of(4), jnp.asarray([2, 1, 1, 1])
    batch["token_valid"] = batch["token_valid"].at[1:].set(False)
    batch["valid"] = batch["valid"].at[2:].set(False)
    counts, sums, _ = gradient(task, params, batch, prefix)
    assert int(counts["text"]) == int(batch["token_valid"][0].sum()) + 1 + 1
    logits = jax.jit(task.predict)(params, batch, prefix).logits
    losses_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"][..., None], axis=2)[..., 0]
    expected = losses_BT[0, : int(counts["text"]) - 1].sum() + losses_BT[1, 0]
    assert float(sums["text"]) == pytest.approx(float(expected), rel=2e-6)
    without_end = dataclasses.replace(task, predict_eos=False).counts(batch, prefix)
    assert int(without_end["text"]) == int(batch["token_valid"][0].sum())


def test_encoder_when_a_later_patch_changes_then_earlier_rows_are_untouched(tiny):
    """Prefix mask for every prefix length: row i changes iff it may attend to patch j."""
    task, params = tiny
    encoder = task.model.encoder
    batch = batch_of(1)
    pixels, coords, valid = task.normalise(batch), batch["coords"], batch["valid"]
    encode = jax.jit(lambda x, prefix: encoder.apply({"params": params["encoder"]}, x, coords, valid, prefix)[0])
    for prefix in range(1, LENGTH + 1):
        run = partial(encode, prefix=jnp.asarray([prefix]))
        before = np.asarray(run(pixels))
        for j in range(LENGTH):
            moved = (np.asarray(run(pixels.at[0, j].add(1.0))) != before).any(axis=-1)[0]
            np.testing.assert_array_equal(
                moved, [j <= i or j < prefix for i in range(LENGTH)], f"K {prefix}, patch {j}"
            )


def test_decoder_when_a_later_row_changes_then_earlier_predictions_are_untouched(tiny):
    task, params = tiny
    batch, prefix = batch_of(1), jnp.asarray([2])
    predict = jax.jit(lambda batch: task.predict(params, batch, prefix))
    before = predict(batch)
    for j in range(TEXT - 1):
        changed = batch | {"tokens": batch["tokens"].at[0, j].add(1)}
        after = predict(changed)
        np.testing.assert_array_equal(after.pixels, before.pixels)
        moved = np.asarray((after.logits != before.logits).any(axis=-1))[0]
        np.testing.assert_array_equal(moved, [j < row for row in range(TEXT)])
    last = batch | {"tokens": batch["tokens"].at[0, -1].add(1)}
    np.testing.assert_array_equal(predict(last).logits, before.logits)


def test_model_when_computed_in_bfloat16_then_parameters_and_gradients_stay_float32(tiny):
    config = tiny_config(model__compute_dtype="bfloat16", model__encoder__position="sincos")
    task, (exact, params) = build_task(config), tiny
    batch, prefix = batch_of(4), jnp.asarray([1, 2, 3, 2])
    _counts, sums, grads = gradient(task, params, batch, prefix)
    initial = jax.eval_shape(task.init, run_key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((initial, grads))} == {jnp.dtype("float32")}
    _, exact_sums, _ = gradient(exact, params, batch, prefix)
    for name in sums:  # bfloat16 rounds by 2^-8 = 0.4 %, averaged over hundreds of values.
        assert float(sums[name]) == pytest.approx(float(exact_sums[name]), rel=0.02)
        assert float(sums[name]) != float(exact_sums[name])


KINDS = {
    "joint": {},
    "kernels": {"model__attention": "pallas"},
    "mlp": {"model__decoder__kind": "mlp", "loss__text": False},
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def lowered(request) -> tuple[str, list[str]]:
    """A compute dtype, and the StableHLO module of a gradient for each kind of decoder."""

    def module(changes) -> str:
        task = build_task(tiny_config(model__compute_dtype=request.param, model__layers="loop", **changes))
        run = partial(accumulate, task=task, microbatches=1)
        batch, prefix = batch_of(4), jnp.ones(4, jnp.int32)
        params = jax.eval_shape(task.init, abstract_key())
        return jax.jit(run).lower(params, batch, prefix, task.counts(batch, prefix)).as_text()

    return request.param, [module(changes) for changes in KINDS.values()]


def test_gradient_lowered_then_sums_are_float32(lowered):
    """All sums over rows are float32; autodiff alone would sum in the rows' dtype."""
    for module in lowered[1]:
        sums = re.findall(r"stablehlo\.reduce\(.*applies stablehlo\.add.*", module)
        assert len(sums) > 10
        assert not [line for line in sums if "bf16" in line]


def test_products_float32_have_highest_precision(lowered):
    """Float32 products have the highest precision; by default TPUs round to bfloat16 and GPUs to TF32."""
    dtype, modules = lowered
    for module in modules:
        products = re.findall(r"stablehlo\.dot_general.*", module)
        assert len(products) > 20
        exact = [line for line in products if "precision = [HIGHEST, HIGHEST]" in line]
        assert len(exact) == (len(products) if dtype == "float32" else 0)


@pytest.mark.parametrize(
    ("platform", "message"),
    [
        ("gpu", "on TPUs only: 'the devices are of platform gpu'"),
        ("tpu", "channels per head in model.encoder: '.* 16 channels per head'"),
    ],
)
def test_kernels_when_they_cannot_run_then_refused(platform, message):
    config = tiny_config(model__attention="pallas")
    assert build_task(config).model.encoder.options.attention == "pallas_interpreted"
    with pytest.raises(UserError, match=message):
        build_task(config, platform)
    tiles = tiny_config(model__encoder__width=256, model__decoder__width=256, model__attention="pallas")
    assert platform == "gpu" or build_task(tiles, platform).model.encoder.options.attention == "pallas"


@pytest.mark.parametrize(
    ("changes", "platform", "message"),
    [
        ({}, "tpu", "on GPUs only: 'the devices are of platform tpu'"),
        (dict(model__compute_dtype="float32"), "gpu", "in bfloat16 only: 'model.compute_dtype=float32'"),
        (dict(model__encoder__heads=8), "gpu", "per head in model.encoder: '.* 4 channels per head'"),
    ],
)
def test_cudnn_attention_refused_where_it_cannot_run(changes, platform, message):
    """The error names platform, dtype or heads; a CPU computes the same masks by XLA."""
    config = tiny_config(**dict(model__attention="cudnn", model__compute_dtype="bfloat16") | changes)
    assert build_task(config).model.encoder.options.attention == "cudnn_on_xla"
    with pytest.raises(UserError, match=message):
        build_task(config, platform)


def test_prefix_when_attention_is_full_then_all_patches_of_every_example():
    task = build_task(tiny_config(loss__image=False, model__encoder__attention_mask="full"))
    np.testing.assert_array_equal(task.sample_prefix(run_key(0), batch_of(3)), [LENGTH] * 3)


def test_rows_when_drawn_then_in_order_valid_first_and_all_as_often():
    size, length, count = 3000, 9, 4
    index = jnp.stack([jnp.zeros(size), jnp.arange(size)], axis=1).astype(jnp.uint32)
    valid = np.ones((size, length), bool)
    valid[:1000, [0, 3, 8]] = False  # Six valid patches remain.
    valid[1000:1100, 2:] = False  # Two valid patches remain.
    draw = jax.jit(lambda index, valid: losses.sample_rows(run_key(0), index, valid, count))
    rows = np.asarray(draw(index, jnp.asarray(valid)))
    assert (np.diff(rows, axis=1) > 0).all()
    is_valid = np.take_along_axis(valid, rows, axis=1)
    assert is_valid[:1000].all() and is_valid[1100:].all() and (is_valid[1000:1100].sum(axis=1) == 2).all()
    for part, patches in ((rows[:1000], 6), (rows[1100:], 9)):
        frequency = np.bincount(part.ravel(), minlength=length) / len(part)
        share = count / patches
        assert (abs(frequency[frequency > 0] - share) < 5 * (share * (1 - share) / len(part)) ** 0.5).all()
        assert (frequency > 0).sum() == patches
    order = np.random.default_rng(0).permutation(size)
    np.testing.assert_array_equal(draw(index[order], jnp.asarray(valid[order])), rows[order])


def test_text_loss_when_rows_are_dropped_then_those_have_no_gradient_and_the_others_do(tiny):
    changes = dict(loss__image=False, model__decoder__token_keep_rate=0.5, model__encoder__position="sincos")
    task, params, batch = build_task(tiny_config(**changes)), tiny[1], batch_of(8)
    kept = task.sample_kept_tokens(run_key(1), batch)
    assert kept["kept"].shape == (8, LENGTH // 2)

    def loss(delta, batch):
        def shifted(run, args, kwargs, context):
            out = run(*args, **kwargs)
            encoded = isinstance(context.module, Encoder) and context.method_name == "__call__"
            return (out[0] + delta, out[1]) if encoded else out

        with nn.intercept_methods(shifted):
            return task.loss(params, batch, jnp.full(8, 2))["text"].sum

    delta = jnp.zeros((8, LENGTH, 32))
    dropped = np.asarray(jax.jit(jax.grad(loss))(delta, batch | kept))
    read = np.zeros((8, LENGTH), bool)
    np.put_along_axis(read, np.asarray(kept["kept"]), True, axis=1)
    np.testing.assert_array_equal((dropped != 0).any(-1), read)
    whole = np.asarray(jax.jit(jax.grad(loss))(delta, batch))
    assert (whole != 0).any(-1).all()  # Without `kept`, as in evaluation, the decoder receives all rows.


def test_separate_decoders_when_trained_then_each_loss_moves_its_own_and_predictions_are_those_of_joint_ones():
    joint, task = (
        build_task(tiny_config(model__layers="scan", model__decoder__kind=kind)) for kind in ("joint", "separate")
    )
    params, batch, prefix = jax.jit(task.init)(run_key(0)), batch_of(2), jnp.asarray([1, 2])

    def weighted_sum(params, weights):
        """Both losses, so that they share a program."""
        sums = task.loss_sums(params, batch, prefix)
        return sum(weight * sums[name] for name, weight in weights.items())

    gradient_of = jax.jit(jax.grad(weighted_sum))
    for loss, own, other in (("image", "image", "text"), ("text", "text", "image")):
        grads = jax.device_get(gradient_of(params, {loss: 1.0, other: 0.0}))
        assert all(leaf.any() for leaf in jax.tree.leaves(grads["decoder"][own]["trunk"]))
        assert not any(leaf.any() for leaf in jax.tree.leaves(grads["decoder"][other]))
        assert all(leaf.any() for leaf in jax.tree.leaves(grads["encoder"]["trunk"]))
    ours, predict = jax.jit(task.predict)(params, batch, prefix), jax.jit(joint.predict)
    text, image = params["decoder"]["text"], params["decoder"]["image"]
    assert "pixel_head" not in text and not {"token_head", "token_table", "begin", "position"} & set(image)
    for own, output in ((text | {"pixel_head": image["pixel_head"]}, "logits"), (text | image, "pixels")):
        theirs = predict({"encoder": params["encoder"], "decoder": own}, batch, prefix)
        # One pass of 16 rows or two of 4 and 16 rows: the float32 sums are split differently.
        np.testing.assert_allclose(getattr(ours, output), getattr(theirs, output), rtol=0, atol=1e-5)


def test_task_when_built_twice_from_one_config_then_equal():
    assert dataclasses.asdict(build_task(tiny_config()))["weights"] == {"image": 0.4, "text": 1.0}
    assert build_task(tiny_config()) == build_task(tiny_config())
