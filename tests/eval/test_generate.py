from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.extend.core import jaxprs_in_params

from aimv2_jax.eval import generate
from aimv2_jax.eval.generate import decode_step, greedy, prefill
from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.models.baselines import SeparateDecoders
from aimv2_jax.models.decoder import Decoder
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.layers import TrunkOptions

B, L, P, T, V, END = 5, 9, 12, 8, 40, 3
WIDTH, DEPTH, HIDDEN = 32, 2, 64


def build(layers: str = "scan") -> AIMv2:
    trunk = {"width": WIDTH, "depth": DEPTH, "heads": 2, "hidden": HIDDEN, "options": TrunkOptions(layers)}
    return AIMv2(
        Encoder(num_patches=L, position="sincos", **trunk),
        Decoder(encoder_width=WIDTH, pixels=P, vocab_size=V, text_length=T, **trunk),
    )


@pytest.fixture(scope="module")
def inputs():
    """Pixels, coordinates and validity: full images, two with padding at different positions, one padding row."""
    valid = np.ones((B, L), bool)
    valid[1, 6:] = False
    valid[2, [0, 1, 4]] = False
    valid[4] = False
    coords = np.broadcast_to(np.indices((3, 3)).reshape(2, -1).T, (B, L, 2)).astype(np.int32)
    pixels = np.random.default_rng(0).normal(size=(B, L, P)).astype(np.float32)
    return jnp.asarray(pixels * valid[..., None]), jnp.asarray(coords), jnp.asarray(valid)


@pytest.fixture(scope="module")
def initial(inputs):
    init = jax.jit(build().init)
    return meta.unbox(init(jax.random.key(0), *inputs, jnp.zeros((B, T), jnp.int32), None)["params"])


@pytest.fixture(scope="module")
def params(initial):
    """Weights large enough that texts differ from image to image."""
    return jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, initial)


@jax.jit
def full_logits(params, inputs, tokens):
    """Logits of every token from one pass over the whole sequence."""
    return build().apply({"params": params}, *inputs, tokens, None, ("logits",)).logits


def naive_greedy(params, inputs, end_id):
    """Greedy decoding that runs the whole decoder for every token."""
    valid = np.asarray(inputs[2])
    tokens, lengths = np.full((B, T), 0 if end_id is None else end_id), np.zeros(B, int)
    ended = ~valid.any(axis=1)
    for index in range(T):
        choice = np.argmax(full_logits(params, inputs, jnp.asarray(tokens, jnp.int32))[:, index], axis=-1)
        tokens[~ended, index] = choice[~ended]
        ended |= tokens[:, index] == end_id
        lengths += ~ended
    return tokens, lengths


def test_logits_token_by_token_equal_the_full_pass(initial, inputs):
    """Decoding with a cache gives the logits of a full pass over all tokens."""
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, V)
    step = jax.jit(partial(decode_step, build()))
    logits, context = jax.jit(lambda: prefill(build(), initial, *inputs, T))()
    steps = [logits]
    for index in range(T - 1):
        logits, context = step(initial, context, tokens[:, index], jnp.int32(index))
        steps.append(logits)
    expected = full_logits(initial, inputs, tokens)[:-1]  # The padding row attends to nothing and is not compared.
    # The same float32 sums in another order, through two blocks: a hundred roundings of 6e-8, of the largest logit.
    np.testing.assert_allclose(jnp.stack(steps, axis=1)[:-1], expected, atol=6e-6 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("layers, ends", [("scan", True), ("loop", False)])
def test_greedy_equals_rerunning_the_decoder(params, inputs, layers, ends):
    """Cached greedy decoding gives the tokens and lengths of rerunning the decoder for each token."""
    # An end token that texts reach at different positions: the middle token of the third image's text.
    end_id = int(naive_greedy(params, inputs, None)[0][2, 3]) if ends else None
    captions = jax.jit(lambda params: greedy(build(layers), params, *inputs, end_id))(params)
    tokens, lengths = naive_greedy(params, inputs, end_id)
    np.testing.assert_array_equal(captions.tokens, tokens)
    np.testing.assert_array_equal(captions.lengths, lengths)
    assert len({tuple(row) for row in tokens.tolist()}) > 2
    assert (lengths[2] < T) == ends and lengths[4] == 0


def test_greedy_ignores_pixels_of_padding(params, inputs):
    """Other pixels in padded patches change no token."""
    pixels, coords, valid = inputs
    other = jnp.where(valid[..., None], pixels, 7.0)
    run = jax.jit(lambda pixels: greedy(build(), params, pixels, coords, valid, END))
    captions, expected = run(other), run(pixels)
    np.testing.assert_array_equal(captions.tokens[:-1], expected.tokens[:-1])


def test_greedy_emits_no_token_beyond_the_tokenizer(params, inputs):
    """Rows of the token table beyond the tokenizer's pieces are never chosen."""
    run = jax.jit(lambda num_pieces: greedy(build(), params, *inputs, None, 3, num_pieces), static_argnums=0)
    assert run(None).tokens.max() >= 10 > run(10).tokens.max()


def counting(step, steps):
    """`decode_step` that appends its index to `steps` each time it runs on the device."""

    def counted(model, params, context, token_B, index):
        jax.debug.callback(lambda index: steps.append(int(index)), index)
        return step(model, params, context, token_B, index)

    return counted


def test_greedy_stops_when_all_texts_have_ended(params, inputs, monkeypatch):
    """No step is computed after the last text has ended."""
    first_row = tuple(x[:1] for x in inputs)
    steps = []

    def run(end_id):
        return jax.jit(lambda: greedy(build(), params, *first_row, end_id))()

    free = run(None).tokens[0].tolist()
    monkeypatch.setattr(generate, "decode_step", counting(generate.decode_step, steps))
    assert run(free[0]).lengths.tolist() == [0] and len(steps) == 0
    assert run(None).lengths.tolist() == [T] and len(steps) == T - 1


def test_greedy_of_separate_decoders(params, inputs):
    """With separate decoders the text decoder alone writes the captions."""
    joint = build()
    model = AIMv2(joint.encoder, SeparateDecoders(image=joint.decoder.clone(has_text=False), text=joint.decoder))
    text = {name: leaf for name, leaf in params["decoder"].items() if name != "pixel_head"}
    both = params | {"decoder": {"text": text}}
    np.testing.assert_array_equal(
        jax.jit(lambda: greedy(model, both, *inputs, None).tokens)(),
        jax.jit(lambda: greedy(joint, params, *inputs, None).tokens)(),
    )


def count_products(jaxpr) -> int:
    """Multiplications in a program's matrix products; the body of a scan counts once per iteration."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * int(np.prod([left[axis] for axis in contracted]))
        inner = jaxprs_in_params(equation.params)
        total += equation.params.get("length", 1) * sum(count_products(body) for body in inner)
    return total


@pytest.mark.parametrize("max_tokens", [T, 2 * T])
def test_decode_step_costs_one_row(params, inputs, max_tokens):
    """A decoding step multiplies as often as one row of the decoder needs."""
    _, context = jax.eval_shape(lambda: prefill(build(), params, *inputs, max_tokens))
    token = jnp.zeros(B, jnp.int32)
    program = jax.make_jaxpr(lambda *args: decode_step(build(), params, *args))(context, token, jnp.int32(0))
    weights = DEPTH * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN) + WIDTH * V
    attention = DEPTH * 2 * WIDTH * (L + max_tokens)
    assert count_products(program.jaxpr) == B * (weights + attention)
