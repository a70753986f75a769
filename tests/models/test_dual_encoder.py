"""Text tower and dual encoder: the released sizes, end tokens, causality, the scale, and meshes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from aimv2_jax.models.aimv2 import count_parameters
from aimv2_jax.models.dual_encoder import DualEncoder
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.layers import Precision, TrunkOptions
from aimv2_jax.models.text_tower import TextTower, first_index
from aimv2_jax.parallel import rules
from aimv2_jax.parallel.mesh import build_mesh
from tests.helpers.golden_names import paths

BATCH, LENGTH, END = 8, 12, 5
IMAGE = dict(width=32, depth=1, heads=2, hidden=64, num_patches=4)
TEXT = dict(vocab_size=64, width=16, depth=1, heads=2, hidden=32, text_length=LENGTH)


def build(loss="softmax", **shared) -> DualEncoder:
    return DualEncoder(Encoder(**IMAGE, **shared), TextTower(**TEXT, **shared), embed_dim=24, loss=loss)


def inputs() -> tuple[jax.Array, ...]:
    """Arguments of `DualEncoder`: the last text has its end token at the last position, the last image one patch."""
    rng = np.random.default_rng(0)
    patches = jnp.asarray(rng.normal(size=(BATCH, 4, 27)), jnp.float32)
    valid = jnp.ones((BATCH, 4), bool).at[-1, 1:].set(False)
    tokens = jnp.asarray(rng.integers(END + 1, 63, (BATCH, LENGTH)), jnp.int32)
    end_index = jnp.arange(LENGTH - BATCH, LENGTH)
    tokens = tokens.at[jnp.arange(BATCH), end_index].set(END)
    return patches, jnp.zeros((BATCH, 4, 2), jnp.int32), valid, tokens, end_index


@pytest.fixture(scope="module")
def boxed():
    """Parameters with the logical names of their axes; with the sigmoid loss, which has all."""
    return jax.jit(build("sigmoid").init)(jax.random.key(0), *inputs())


@pytest.fixture(scope="module")
def params(boxed):
    return meta.unbox(boxed)


def test_released_shape_has_436680193_parameters():
    """Its parts have the sizes of aimv2-large-patch14-224-lit."""
    encoder = Encoder(1024, 24, 8, 2816, 256)
    text = TextTower(49_408, 768, 12, 6, 2048, 77)
    types = {(1, 256, 588): jnp.float32, (1, 256, 2): jnp.int32, (1, 256): bool, (1, 77): jnp.int32, (1,): jnp.int32}
    arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in types.items())
    params = jax.eval_shape(DualEncoder(encoder, text, 768).init, jax.random.key(0), *arrays)["params"]
    count = {name: count_parameters(tree) for name, tree in meta.unbox(params).items()}
    assert count["encoder"] + count["head"] == 312_345_600
    assert count["text"] == 122_958_336
    assert count["image_projection"] + count["text_projection"] == 1_376_256
    assert sum(count.values()) == 436_680_193


def test_dual_encoder_initialises_as_published(params):
    """The names are those of checkpoints; token and position tables are small, the scale starts as in the papers."""
    tree = params["params"]
    names = paths({name: tree[name] for name in tree if name not in ("encoder", "text")})
    assert set(names) == {
        "head/output/bias",
        "head/output/kernel",
        "head/pool/key/kernel",
        "head/pool/query",
        "head/pool/value/kernel",
        "image_projection/kernel",
        "logit_bias",
        "logit_scale",
        "text_projection/kernel",
    }
    assert set(tree["text"]) == {"token_table", "position", "trunk"}
    assert np.std(tree["text"]["token_table"]) == pytest.approx(0.02, rel=0.1)
    assert np.std(tree["text"]["position"]) == pytest.approx(0.01, rel=0.15)
    assert tree["logit_scale"] == np.float32(math.log(10))
    assert tree["logit_bias"] == -10
    softmax = jax.eval_shape(build().init, jax.random.key(0), *inputs())["params"]
    assert "logit_bias" not in softmax
    scale = build().apply({"params": {"logit_scale": jnp.log(1 / 0.07)}}, method="scale")
    assert scale == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.parametrize("attention", ["xla", "pallas_interpreted"])
def test_text_tower_is_causal(params, attention):
    """A later token changes no earlier row, also of a shorter text; the row of the token itself changes."""
    tokens, tower = inputs()[3], TextTower(**TEXT, options=TrunkOptions(attention=attention))
    tree = {"params": params["params"]["text"]}
    features, _ = tower.apply(tree, tokens)
    changed, _ = tower.apply(tree, tokens.at[:, 7].set(63))
    np.testing.assert_array_equal(features[:, :7], changed[:, :7])
    assert np.abs(features[:, 7:] - changed[:, 7:]).max(-1).all()
    shorter, _ = tower.apply(tree, tokens[:, :7])
    np.testing.assert_allclose(shorter, features[:, :7], rtol=0, atol=1e-6 * np.abs(features).max())


def test_text_tower_refuses_longer_texts(params):
    """The error names the number of positions, and of tokens."""
    with pytest.raises(ValueError, match="positions for 12 tokens, got 13"):
        TextTower(**TEXT).apply({"params": params["params"]["text"]}, jnp.zeros((1, 13), jnp.int32))


def test_text_embedding_is_the_row_of_the_first_end(params):
    """It depends neither on what follows the first end token nor on further end tokens, but on all before."""
    *_, tokens, end_index = inputs()
    model = build("sigmoid")

    def embed(tokens):
        return np.asarray(model.apply(params, tokens, first_index(tokens == END), method="text_embedding"))

    np.testing.assert_array_equal(first_index(tokens == END), end_index)
    plain = embed(tokens)
    after = jnp.arange(LENGTH) > end_index[:, None]
    np.testing.assert_array_equal(embed(jnp.where(after, END, tokens)), plain)
    np.testing.assert_array_equal(embed(jnp.where(after, 0, tokens)), plain)
    assert np.abs(embed(tokens.at[:, 0].add(1)) - plain).max(1).all()
    features, hidden_states = TextTower(**TEXT).apply({"params": params["params"]["text"]}, tokens, True)
    assert hidden_states.shape == (TEXT["depth"] + 1, *features.shape)
    row = features[jnp.arange(BATCH), end_index] @ params["params"]["text_projection"]["kernel"]
    np.testing.assert_allclose(plain, row / jnp.linalg.norm(row, axis=1, keepdims=True), rtol=0, atol=1e-6)


def test_embeddings_are_float32_of_length_one(params):
    """Also with towers in bfloat16, from which the embeddings differ by rounding; padded patches change nothing."""
    exact = build("sigmoid").apply(params, *inputs())
    rounded = build("sigmoid", precision=Precision(compute=jnp.bfloat16)).apply(params, *inputs())
    for ours, theirs in zip(rounded[:2], exact[:2]):
        assert ours.dtype == theirs.dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(ours, axis=1), 1, rtol=0, atol=1e-6)
        # A projection of the rounded features in float32: bfloat16 has eight bits.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-2)
        assert np.abs(ours - theirs).max() > 1e-5
    patches, *others = inputs()
    padded = build("sigmoid").apply(params, patches.at[-1, 1:].set(9), *others)
    np.testing.assert_array_equal(padded.image, exact.image)


@pytest.mark.parametrize(("start", "scale", "slope"), [(-1, 1, 0), (2, math.exp(2), math.exp(2)), (5, 100, 0)])
def test_logit_scale_has_no_gradient_beyond_clip(start, scale, slope):
    """The scale is exp(parameter) from 1 to 100, and constant outside."""

    def of(value):
        return build().apply({"params": {"logit_scale": value}}, method="scale")

    actual = jax.value_and_grad(of)(jnp.float32(start))
    np.testing.assert_allclose(actual, (scale, slope), rtol=1e-6)


def test_dual_encoder_on_eight_devices(boxed, params, always_compiled, capfd):
    """With a frozen encoder, embeddings and gradients are those of one device, and no tensor is gathered to reshard."""
    model, weights = build("sigmoid"), jnp.arange(1.0, 25)

    def objective(trained, encoder, *arrays):
        out = model.apply({"params": {"encoder": encoder, **trained}}, *arrays)
        return jnp.sum(jnp.square(out.image @ weights) + jnp.square(out.text @ weights)) + out.scale + out.bias, out

    step = jax.jit(jax.value_and_grad(objective, has_aux=True))

    def split(tree):
        return {name: tree[name] for name in tree if name != "encoder"}, tree["encoder"]

    one_device = step(*split(params["params"]), *inputs())
    mesh = build_mesh(1, 2, 2, 2)
    shardings = rules.param_shardings(nn.get_partition_spec(boxed), mesh)
    rules.check_divisible(params["params"], shardings["params"])
    placed = jax.device_put(params, shardings)["params"]
    with rules.scope(mesh):
        eight_devices = step(*split(placed), *jax.device_put(inputs(), rules.batch_sharding(mesh)))
    assert "rematerialization" not in capfd.readouterr().err
    (_, embeddings), gradients = jax.device_get(one_device)
    (_, embeddings_2), gradients_2 = jax.device_get(eight_devices)
    for ours, theirs in zip(embeddings_2[:2], embeddings[:2]):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
    assert gradients.keys() == params["params"].keys() - {"encoder"}
    expected = paths(gradients)
    for path, leaf in paths(gradients_2).items():
        assert leaf.any(), path
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=2e-5 * np.abs(leaf).max(), err_msg=path)
