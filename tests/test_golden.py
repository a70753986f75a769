"""Model, losses, gradients and optimiser against tensors computed by the reference implementation.

`pytest tests/test_golden.py --golden DIR` reads every size, seed and hyper-parameter from the directory's json files
and tensor shapes. The comparison uses the training model with every option for running its layers.

Tolerances (an independent float32 model reaches 1.3e-6, 2.5e-6, 2e-7 and 1.5e-5; the tensors are float64 rounded once):
activations and gradients 2e-5 of a tensor's largest entry, losses 5e-6 relative, parameters 3e-5 absolute.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file

from aimv2_jax.export import apple_export
from aimv2_jax.export.hf_export import write_folder
from aimv2_jax.models.attention import MaskSpec
from aimv2_jax.models.layers import TrunkOptions
from aimv2_jax.models.position_embeddings import resize_positions, sincos_positions
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.hf_import import read_weights
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.train import anomaly, losses
from aimv2_jax.train.optimizer import adamlh, is_decayed, learning_rate
from aimv2_jax.train.pretrain_task import PretrainTask
from aimv2_jax.train.step import StepOptions, TrainState, accumulate, train_step
from aimv2_jax.train.task import run_key
from tests.helpers.golden_names import APPLE_PRETRAIN, nested, paths, to_ours
from tests.helpers.golden_pretrain import Pretrain, read_json, read_tensors

LARGEST_ENTRY = 2e-5
LOSS_RELATIVE = 5e-6
PARAMETER_ABSOLUTE = 3e-5
WAYS = [(layers, remat) for layers in ("scan", "loop") for remat in ("none", "attention", "full")]
# For a forward pass, which rematerialises nothing, and for the use of losses and gradients.
TWO_WAYS = [("scan", "none"), ("loop", "full")]
# Forward passes and full train steps are compiled like users' code; gradients alone like the rest of the suite.
fully_optimized = pytest.mark.usefixtures("fully_optimized")


def assert_close(ours, theirs, what: str, tolerance: float = LARGEST_ENTRY):
    """Within `tolerance` of the largest entry of `theirs`."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{what}: shape {ours.shape}, expected {theirs.shape}"
    error = np.abs(ours - theirs).max()
    assert error <= tolerance * np.abs(theirs).max(), f"{what}: off by {error}, largest entry {np.abs(theirs).max()}"


@pytest.fixture(scope="module")
def pretrain(golden_dir) -> Pretrain:
    return Pretrain(golden_dir / "pretrain")


every_way, two_ways = (pytest.mark.parametrize("way", ways, ids="-".join) for ways in (WAYS, TWO_WAYS))


def test_parameters_when_mapped_then_the_tree_is_exactly_ours(pretrain):
    shapes = paths(jax.eval_shape(pretrain.task("scan", "none").init, run_key(0)))
    ours = pretrain.ours("params.safetensors")
    assert {path: leaf.shape for path, leaf in shapes.items()} == {path: leaf.shape for path, leaf in ours.items()}


def test_targets_when_pixels_are_normalised_then_equal(pretrain):
    task, batch = pretrain.task("scan", "none"), pretrain.batch
    targets = read_tensors(pretrain.directory / "targets.safetensors", {"patches_normalised", "patches_raw"})
    pixels = task.normalise(batch)
    assert_close(pixels, targets["patches_raw"], "patches_raw")
    side = pretrain.sizes["patch_size"]
    image = rearrange(pretrain.raw_batch["image_normalised_bchw"], "b c (h p) (w q) -> b (h w) (p q c)", p=side, q=side)
    assert_close(pixels, image, "image_normalised_bchw")
    assert_close(losses.patch_targets(pixels, task.target_eps), targets["patches_normalised"], "patches_normalised")
    outside = losses.image_loss_mask(jnp.asarray(pretrain.prefix), jnp.asarray(batch["valid"]))
    np.testing.assert_array_equal(outside, pretrain.raw_batch["image_loss_mask"])


@fully_optimized
@two_ways
def test_activations_when_run_as_in_training_then_equal(pretrain, way):
    task, batch, prefix = pretrain.task(*way), pretrain.batch, jnp.asarray(pretrain.prefix)
    encoder, decoder = task.model.encoder, task.model.decoder
    expected = {"decoder.embedded_text", "decoder.final_norm", "decoder.input", "decoder.projected_image"}
    expected |= {"encoder.attention_mask", "encoder.final_norm", "encoder.input", "encoder.patch_embed"}
    expected |= {"predicted_pixels", "text_logits"}
    expected |= {f"encoder.block_{i}" for i in range(encoder.depth)}
    expected |= {f"decoder.block_{i}" for i in range(decoder.depth)}
    theirs = read_tensors(pretrain.directory / "activations.safetensors", expected)
    variables = {part: {"params": pretrain.params[part]} for part in ("encoder", "decoder")}

    mask = MaskSpec(prefix, jnp.asarray(batch["valid"])).mask(batch["valid"].shape[1])
    np.testing.assert_array_equal(mask[:, 0], theirs["encoder.attention_mask"])
    (features, every), captured = encoder.apply(
        variables["encoder"],
        task.normalise(batch),
        batch["coords"],
        batch["valid"],
        prefix,
        True,
        capture_intermediates=lambda module, _: module.name == "patch_norm",
        mutable=["intermediates"],
    )
    assert_close(captured["intermediates"]["patch_norm"]["__call__"][0], theirs["encoder.patch_embed"], "patch_embed")
    assert_close(every[0], theirs["encoder.input"], "encoder.input")
    for i in range(encoder.depth):
        assert_close(every[i + 1], theirs[f"encoder.block_{i}"], f"encoder.block_{i}")
    assert_close(features, theirs["encoder.final_norm"], "encoder.final_norm")

    apply = partial(decoder.apply, variables["decoder"])
    tokens = batch["tokens"][:, :-1]  # The last token predicts nothing, so its row is not computed.
    image = apply(features, method="embed_image")
    text = apply(tokens, method="embed_text")
    assert_close(image, theirs["decoder.projected_image"], "decoder.projected_image")
    assert_close(text, theirs["decoder.embedded_text"][:, :-1], "decoder.embedded_text")
    assert_close(np.concatenate([image, text], axis=1), theirs["decoder.input"][:, :-1], "decoder.input")
    rows, every = apply(features, batch["valid"], tokens, True)
    for i in range(decoder.depth):
        assert_close(every[i], theirs[f"decoder.block_{i}"][:, :-1], f"decoder.block_{i}")
    assert_close(rows, theirs["decoder.final_norm"][:, :-1], "decoder.final_norm")

    predictions = jax.jit(task.predict)(pretrain.params, batch, prefix)
    assert_close(predictions.pixels, theirs["predicted_pixels"][:, :-1], "predicted_pixels")
    assert_close(predictions.logits, theirs["text_logits"][:, :-1], "text_logits")


def loss_and_gradients(task: PretrainTask, pretrain: Pretrain, microbatches: int = 1):
    batch, prefix = pretrain.batch, jnp.asarray(pretrain.prefix)
    counts = task.counts(batch, prefix)
    run = jax.jit(partial(accumulate, task=task, microbatches=microbatches))
    sums, grads = run(pretrain.params, batch, prefix, counts)
    return counts, sums, float(task.total(sums, counts)), paths(grads)


def check_losses(expected: dict, counts, sums, total):
    for name in ("image", "text"):
        assert int(counts[name]) == expected[f"{name}_count"]
        assert float(sums[name] / counts[name]) == pytest.approx(expected[f"{name}_loss"], rel=LOSS_RELATIVE)
        if f"{name}_numerator" in expected:
            assert float(sums[name]) == pytest.approx(expected[f"{name}_numerator"], rel=LOSS_RELATIVE)
    assert total == pytest.approx(expected["total_loss"], rel=LOSS_RELATIVE)


@every_way
def test_losses_and_gradients_when_one_batch_then_equal(pretrain, way):
    counts, sums, total, grads = loss_and_gradients(pretrain.task(*way), pretrain)
    check_losses(read_json(pretrain.directory / "losses.json"), counts, sums, total)
    for path, theirs in pretrain.ours("grads.safetensors").items():
        assert_close(grads[path], theirs, f"gradient of {path}")


def test_losses_and_gradients_with_cudnn_masks(pretrain):
    """Attention by the masks that cuDNN knows has the reference's losses and gradients, too."""
    counts, sums, total, grads = loss_and_gradients(pretrain.task("scan", "none", attention="cudnn_on_xla"), pretrain)
    check_losses(read_json(pretrain.directory / "losses.json"), counts, sums, total)
    for path, theirs in pretrain.ours("grads.safetensors").items():
        assert_close(grads[path], theirs, f"gradient of {path}")


def test_losses_and_gradients_when_accumulated_row_by_row_then_equal(pretrain):
    task = pretrain.task("scan", "none")
    counts, sums, total, grads = loss_and_gradients(task, pretrain, microbatches=pretrain.sizes["batch"])
    check_losses(read_json(pretrain.directory / "losses.json"), counts, sums, total)
    for path, theirs in pretrain.ours("grads.safetensors").items():
        assert_close(grads[path], theirs, f"gradient of {path}")


def test_losses_and_gradients_when_the_end_is_predicted_then_equal(pretrain, golden_dir):
    directory = golden_dir / "pretrain_eos"
    targets = read_tensors(directory / "targets.safetensors", {"text_targets"})["text_targets"]
    token_valid = jnp.asarray(pretrain.batch["token_valid"])
    counted = losses.text_loss_mask(token_valid, jnp.ones(len(token_valid), bool), predict_eos=True)
    np.testing.assert_array_equal(np.where(counted, pretrain.batch["tokens"], -100), targets)
    counts, sums, total, grads = loss_and_gradients(pretrain.task("scan", "none", predict_eos=True), pretrain)
    check_losses(read_json(directory / "losses.json"), counts, sums, total)
    tensors = read_tensors(directory / "grads.safetensors", pretrain.names())
    for path, theirs in to_ours(tensors, APPLE_PRETRAIN).items():
        assert_close(grads[path], theirs, f"gradient of {path}")


def test_decay_mask_when_read_by_path_then_equal(pretrain):
    decayed = {k: np.asarray(v) for k, v in pretrain.config["optimizer"]["decayed"].items()}
    shaped = {name: np.full(tensor.shape, decayed[name]) for name, tensor in _params(pretrain).items()}
    theirs = {path: leaf.all() for path, leaf in to_ours(shaped, APPLE_PRETRAIN).items()}
    assert paths(is_decayed(pretrain.params)) == theirs


def _params(pretrain):
    return read_tensors(pretrain.directory / "params.safetensors", pretrain.names())


@fully_optimized
@pytest.mark.parametrize("way", [TWO_WAYS[0], pytest.param(TWO_WAYS[1], marks=pytest.mark.slow)], ids="-".join)
def test_train_steps_when_repeated_on_one_batch_then_parameters_and_moments_equal(pretrain, way):
    """Gradients are compared in every way above, so one way of running the layers suffices for the optimiser."""
    golden = pretrain.config["optimizer"]
    schedule = learning_rate(
        start_lr=golden["lr_start"],
        peak_lr=golden["lr_peak_given_to_constructor"],
        end_lr=golden["lr_end"],
        warmup_steps=golden["warmup_steps"],
        schedule_steps=golden["warmup_steps"] + golden["cosine_steps"],
    )
    optimizer = adamlh(
        schedule,
        peak_lr=golden["lr_peak_given_to_constructor"],
        betas=tuple(golden["betas"]),
        eps=golden["eps"],
        weight_decay=golden["weight_decay"],
        clip_norm=golden["grad_clip_global_norm"],
        clip_eps=golden["grad_clip_eps"],
    )
    task = pretrain.task(*way)
    params = pretrain.params
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), anomaly.initial_state())
    step = jax.jit(partial(train_step, task=task, optimizer=optimizer, schedule=schedule, options=StepOptions()))
    assert [expected["step"] for expected in golden["steps"]] == [1, 2, 3]  # The files listed in the README.
    for expected in golden["steps"]:
        state, metrics = step(state, pretrain.batch, run_key(0), jnp.asarray(pretrain.prefix))
        number = expected["step"]
        assert float(metrics["lr"]) == pytest.approx(expected["lr"], rel=1e-6)
        assert float(metrics["loss"]) == pytest.approx(expected["total_loss_before_step"], rel=LOSS_RELATIVE)
        assert float(metrics["grad_norm"]) == pytest.approx(expected["grad_norm"], rel=LARGEST_ENTRY)
        ours = paths(state.params)
        for path, theirs in pretrain.ours(f"adamlh_step_{number}.safetensors").items():
            np.testing.assert_allclose(
                ours[path], theirs, rtol=0, atol=PARAMETER_ABSOLUTE, err_msg=f"{path}, step {number}"
            )
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    # A gradient and its clipping factor may each be off by LARGEST_ENTRY, their product by twice that. Each step after
    # the first starts from parameters changed by the previous one, and may add the same error again. The moments are
    # means over the steps of g and of g², and the relative error of g² is twice that of g.
    first = 2 * LARGEST_ENTRY * (1 + len(golden["steps"])) / 2
    for prefix, moments, tolerance in (("exp_avg.", adam.mu, first), ("exp_avg_sq.", adam.nu, 2 * first)):
        moments = paths(moments)
        for path, theirs in pretrain.ours("adamlh_moments_step_3.safetensors", prefix).items():
            assert_close(moments[path], theirs, f"{prefix}{path}", tolerance)


def test_learning_rate_when_asked_at_given_iterations_then_equal(pretrain):
    golden, recipe = pretrain.config["optimizer"], pretrain.config["reference_recipe"]
    total = golden["warmup_steps"] + golden["cosine_steps"]
    scaled = learning_rate(
        start_lr=golden["lr_start"],
        peak_lr=golden["lr_peak_given_to_constructor"],
        end_lr=golden["lr_end"],
        warmup_steps=golden["warmup_steps"],
        schedule_steps=total,
    )
    check_rates(scaled, dict(enumerate(golden["lr_of_iteration_0_to_end"])), golden["warmup_steps"], total)
    total = recipe["total_iterations"]
    full = learning_rate(start_lr=1e-6, peak_lr=1e-3, end_lr=1e-5, warmup_steps=12_500, schedule_steps=total)
    check_rates(full, {int(it): lr for it, lr in recipe["lr_at_iteration"].items()}, 12_500, total)


def check_rates(schedule, expected: dict[int, float], warmup_steps: int, total: int):
    """Compares all rates but the last of the warm-up, which the reference's slack of 1e-6 of the run already cools."""
    compared = {it: lr for it, lr in expected.items() if not it < warmup_steps <= it + 1e-6 * total}
    assert compared
    for it, lr in compared.items():
        assert float(schedule(jnp.asarray(it))) == pytest.approx(lr, rel=1e-6), f"iteration {it}"


class GoldenImages:
    """Images of a golden encoder by grid suffix, and the reference's outputs for them."""

    def __init__(self, directory: Path, golden: dict, outputs: list[str]):
        grids = {"": golden["grid_height_width"]}
        grids |= {f"_{rows}x{columns}": [rows, columns] for rows, columns in golden["extra_grids"]}
        keys = ("image_uint8_bhwc", "pixel_values")
        inputs = read_tensors(directory / "inputs.safetensors", {f"{key}{grid}" for key in keys for grid in grids})
        self.outputs = read_tensors(
            directory / "outputs.safetensors", {f"{output}{grid}" for output in outputs for grid in grids}
        )
        self._inputs, self.grids = inputs, grids

    def batch(self, grid: str, spec: EncoderSpec) -> tuple[jax.Array, ...]:
        """Returns normalised patches (compared with the reference's), coordinates, and an all-valid mask."""
        (rows, columns), side = self.grids[grid], spec.patch_size
        images, theirs = self._inputs[f"image_uint8_bhwc{grid}"], self._inputs[f"pixel_values{grid}"]
        patches = jnp.asarray(rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=side, q=side))
        valid = jnp.ones(patches.shape[:2], bool)
        pixels = losses.normalise_pixels(patches, valid, spec.pixel_mean, spec.pixel_std)
        assert_close(pixels, rearrange(theirs, "b c (h p) (w q) -> b (h w) (p q c)", p=side, q=side), "pixel_values")
        coords = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(1, -1, 2)
        return pixels, jnp.broadcast_to(jnp.asarray(coords, jnp.int32), (len(images), rows * columns, 2)), valid


def params_of(weights: LazyWeights) -> dict:
    return jax.tree.map(jnp.asarray, nested(weights.read()))


HUGGING_FACE = ["hf_learned", "hf_native", "hf_head"]


@fully_optimized
@two_ways
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_model_when_read_then_hidden_states_equal(golden_dir, name, way):
    directory = golden_dir / name
    golden, weights = read_json(directory / "golden.json"), read_weights(directory)
    spec, params = weights.spec, params_of(weights)
    # Hugging Face may list fewer states than the model has, but every listed one must be in the file.
    states = [f"hidden_state_{i}" for i in range(golden["num_hidden_states"])]
    images = GoldenImages(directory, golden, [*states, "last_hidden_state", *(["pooler_output"] if spec.head else [])])
    assert spec.head == (name == "hf_head")
    for grid in images.grids:
        pixels, coords, valid = images.batch(grid, spec)
        encoder = spec.encoder(options=TrunkOptions(*way))
        features, every = encoder.apply({"params": params["encoder"]}, pixels, coords, valid, None, True)
        for i, state in enumerate(states):
            assert_close(every[i], images.outputs[f"{state}{grid}"], f"{state}{grid}")
        assert_close(features, images.outputs[f"last_hidden_state{grid}"], f"last_hidden_state{grid}")
        if spec.head:
            pooled = spec.pooled_head().apply({"params": params["head"]}, features, valid)
            assert_close(pooled, images.outputs[f"pooler_output{grid}"], f"pooler_output{grid}")


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_model_when_read_and_written_then_the_same_bit_for_bit(golden_dir, tmp_path, name):
    write_folder(tmp_path, read_weights(golden_dir / name), "float32", max_file_bytes=10**9)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (golden_dir / name, tmp_path))
    assert ours.keys() == theirs.keys()
    for tensor in theirs:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor], err_msg=tensor, strict=True)
    written, config = read_json(tmp_path / "config.json"), read_json(golden_dir / name / "config.json")
    written.pop("aimv2_jax", None)  # The area of a native model; Hugging Face has no such key.
    assert {key: config[key] for key in written} == written


@fully_optimized
@pytest.mark.parametrize("name", ["learned", "native", "attention_pool"])
def test_apples_released_names_when_read_then_blocks_and_features_equal(golden_dir, name):
    directory, golden = golden_dir / "apple_aim" / name, read_json(golden_dir / "apple_aim/config.json")["models"][name]
    weights = read_weights(directory / "params.safetensors", heads=golden["heads"])
    spec, params = weights.spec, params_of(weights)
    assert (spec.depth, spec.hidden, spec.head) == (
        golden["depth"],
        golden["swiglu_hidden"],
        golden["attention_pool_head"],
    )
    blocks, last = [f"block_{i}" for i in range(spec.depth)], "pooled" if spec.head else "features"
    images = GoldenImages(directory, golden, [*blocks, last])
    for grid in images.grids:
        pixels, coords, valid = images.batch(grid, spec)
        features, every = spec.encoder().apply({"params": params["encoder"]}, pixels, coords, valid, None, True)
        for i, block in enumerate(blocks):
            assert_close(every[i + 1], images.outputs[f"{block}{grid}"], f"{block}{grid}")
        if spec.head:
            features = spec.pooled_head().apply({"params": params["head"]}, features, valid)
        assert_close(features, images.outputs[f"{last}{grid}"], f"{last}{grid}")


@pytest.mark.parametrize("name", ["learned", "native", "attention_pool"])
def test_apple_model_written_again(golden_dir, tmp_path, name):
    """A model under Apple's names is read and written again with the same tensors bit for bit."""
    file = golden_dir / "apple_aim" / name / "params.safetensors"
    heads = read_json(golden_dir / "apple_aim/config.json")["models"][name]["heads"]
    apple_export.write_folder(tmp_path, read_weights(file, heads), "float32")
    theirs, ours = load_file(file), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor in theirs:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor], err_msg=tensor, strict=True)
    assert read_weights(tmp_path).spec == read_weights(file, heads).spec


def test_sincos_positions_when_any_grid_then_equal_to_every_source(golden_dir):
    directory = golden_dir / "pos_embed"
    config = read_json(directory / "config.json")
    tables = {f"sincos_{h}x{w}_d{d}": (h, w, d) for h, w, d in config["sincos"]}
    expected = {f"{table}.{source}" for table in tables for source in ("hf", "ml_aim", "ml_l3m")}
    for case in config["resize"]:
        (h, w), (to_h, to_w) = case["from"], case["to"]
        operators = ("source", "bicubic", "bicubic_antialias", "bilinear", "bilinear_antialias")
        expected |= {f"resize_{h}x{w}_to_{to_h}x{to_w}_d{case['dim']}.{operator}" for operator in operators}
    tensors = read_tensors(directory / "pos_embed.safetensors", expected)
    for table, (rows, columns, width) in tables.items():
        coords = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(1, -1, 2)
        ours = sincos_positions(jnp.asarray(coords, jnp.int32), width)[0]
        for source in ("hf", "ml_aim", "ml_l3m"):
            # Angles are up to `rows` radians in float32; half a unit in the last place of 16 is 1e-6.
            np.testing.assert_allclose(ours, tensors[f"{table}.{source}"], rtol=0, atol=2e-6, err_msg=table)


def test_position_table_when_resized_then_equals_torchs_antialiased_bicubic(golden_dir):
    directory = golden_dir / "pos_embed"
    tensors = load_file(directory / "pos_embed.safetensors")
    for case in read_json(directory / "config.json")["resize"]:
        (h, w), (to_h, to_w) = case["from"], case["to"]
        name = f"resize_{h}x{w}_to_{to_h}x{to_w}_d{case['dim']}"
        ours = resize_positions(jnp.asarray(tensors[f"{name}.source"]), (h, w), (to_h, to_w))
        # Torch computed in float64; ours are float32 sums of 16 products of values up to 4.
        np.testing.assert_allclose(ours, tensors[f"{name}.bicubic_antialias"], rtol=0, atol=1e-5, err_msg=name)
