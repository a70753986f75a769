"""The head of a dense probe, its predictions at pixels, and its losses.

B batch, L patches, F features, K outputs, R x C patches of a window's grid, H and W pixels, h rows of pixels.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.eval.dense.dataset import IGNORED
from aimv2_jax.eval.dense.settings import DEPTH, DenseConfig

_INIT_STD = 0.01
_MOMENTUM, _EPS = 0.9, 1e-5  # PyTorch's BatchNorm: its momentum of 0.1 is 1 - 0.9.
_BIN_FLOOR = 0.1  # AdaBins' linear normalisation: every bin keeps some weight.
_LOG_FLOOR, _MEAN_WEIGHT = 0.001, 0.15
# dinov3's 100 of 38,400 steps, and less of a training that is shorter than 1,000: of 250, 100 cost 0.2 m of RMSE.
_MEAN_ONLY_STEPS, _MEAN_ONLY_SHARE = 100, 10


class DenseHead(nn.Module):
    """BatchNorm over all valid patches, then a linear layer of each patch."""

    outputs: int
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, features: Float[Array, "B L F"], valid: Bool[Array, "B L"], train: bool = False
    ) -> Float[Array, "B L K"]:
        """Returns the outputs of each patch; `train` takes the batch's statistics and drops whole features."""
        features = nn.Dropout(self.dropout, broadcast_dims=(1,), deterministic=not train)(features)
        norm = nn.BatchNorm(use_running_average=not train, momentum=_MOMENTUM, epsilon=_EPS, name="norm")
        init = nn.initializers.normal(_INIT_STD)
        return nn.Dense(self.outputs, kernel_init=init, name="outputs")(norm(features, mask=valid[..., None]))


def depths_from(outputs: Float[Array, "*B K"], limits: tuple[float, float]) -> Float[Array, "*B 1"]:
    """Depths of patches: the mean of K depths between `limits`, weighted by the outputs; by regression if K is 1."""
    if outputs.shape[-1] == 1:
        return nn.relu(outputs) + limits[0]
    weights = nn.relu(outputs) + _BIN_FLOOR
    bins = jnp.linspace(*limits, outputs.shape[-1])
    return jnp.sum(weights * bins, -1, keepdims=True) / jnp.sum(weights, -1, keepdims=True)


def on_canvas(
    outputs: Float[Array, "B L K"], grids: Int[Array, "B 2"], canvas: tuple[int, int], compact: bool
) -> Float[Array, "B R C K"]:
    """Outputs of patches by row and column; what is outside an image's grid is arbitrary.

    Args:
      outputs: in raster order of the canvas, or with `compact` of each image's own grid.
      grids: (rows, columns) of each image.
      canvas: (R, C).
      compact: whole images, whose patches have no gaps.
    """
    if not compact:
        return outputs.reshape(len(outputs), *canvas, -1)
    rows, columns = jnp.arange(canvas[0])[None, :, None], jnp.arange(canvas[1])[None, None]
    index = (rows * grids[:, 1, None, None] + columns).reshape(len(outputs), -1, 1)
    taken = jnp.take_along_axis(outputs, index.clip(0, outputs.shape[1] - 1), axis=1)
    return taken.reshape(len(outputs), *canvas, -1)


def upsampling(counts: Int[Array, " B"], patches: int, patch_size: int) -> Float[Array, "B H R"]:
    """Weights of the bilinear interpolation from `counts` patches to their pixels, as `windows.interpolation`."""
    centres = (jnp.arange(patches * patch_size) + 0.5) / patch_size - 0.5
    inside = jnp.clip(centres[None], 0, (counts[:, None] - 1).astype(jnp.float32))
    return jnp.maximum(0, 1 - jnp.abs(inside[:, :, None] - jnp.arange(patches)))


def pixel_sums(
    canvas: Float[Array, "B R C K"], grids: Int[Array, "B 2"], truth: Array, patch_size: int, config: DenseConfig
) -> Float[Array, " 3"]:
    """Sums over the pixels that count, from which `loss_from` computes the loss.

    Segmentation: of cross-entropy, 0, and 1. Depth: of g, g² and 1, with g = log(depth + 0.001) - log(truth + 0.001).
    The pixels of one row of patches are in memory at a time, in the backward pass too.
    """
    batch, rows, columns, _ = canvas.shape
    y = upsampling(grids[:, 0], rows, patch_size).reshape(batch, rows, patch_size, rows).swapaxes(0, 1)
    x = upsampling(grids[:, 1], columns, patch_size)
    across = jnp.einsum("brck,bwc->brwk", canvas, x)
    truth = truth.reshape(batch, rows, patch_size, -1).swapaxes(0, 1)

    @jax.checkpoint
    def of_row(across: Array, y: Array, truth: Array) -> Array:
        values = jnp.einsum("bhr,brwk->bhwk", y, across)
        if config.task == DEPTH:
            counted = (truth > config.depths[0]) & (truth < config.depths[1])
            difference = jnp.log(values[..., 0] + _LOG_FLOOR) - jnp.log(jnp.where(counted, truth, 1.0) + _LOG_FLOOR)
            parts = difference, jnp.square(difference)
        else:
            counted = truth != IGNORED
            labels = jnp.where(counted, truth, 0).astype(jnp.int32)
            parts = optax.softmax_cross_entropy_with_integer_labels(values, labels), jnp.zeros_like(values[..., 0])
        return jnp.stack([jnp.sum(part, where=counted) for part in (*parts, jnp.ones_like(parts[0]))])

    def add(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        return total + of_row(across, *row), None

    return jax.lax.scan(add, jnp.zeros(3), (y, truth))[0]


def loss_from(sums: Float[Array, " 3"], step: Int[Array, ""], config: DenseConfig) -> Float[Array, ""]:
    """Mean cross-entropy; or the scale-invariant loss sqrt(var(g) + 0.15 mean(g)²), without var in the first steps.

    Those are 100 steps, but at most a tenth of the training.
    """
    total, squares, count = sums
    mean = total / jnp.maximum(count, 1)
    if config.task != DEPTH:
        return mean
    variance = jnp.maximum(squares - count * jnp.square(mean), 0) / jnp.maximum(count - 1, 1)
    first = min(_MEAN_ONLY_STEPS, config.steps // _MEAN_ONLY_SHARE)
    inner = _MEAN_WEIGHT * jnp.square(mean) + jnp.where(step < first, 0, variance)
    return jnp.sqrt(jnp.maximum(inner, 1e-12))  # Its gradient at 0 is infinite.


@partial(jax.jit, static_argnames=("softmax",))
def merged(
    outputs: Float[Array, "n R C K"], rows: Float[Array, "n h R"], columns: Float[Array, "n W C"], softmax: bool
) -> Float[Array, "h W K"]:
    """The mean over windows of their outputs at some rows of pixels; with `softmax`, the probabilities of that mean.

    Args:
      outputs: of the patches of each window.
      rows, columns: from `windows.window_weights`; zero where a window does not cover a pixel.
      softmax: whether the outputs are logits.
    """
    total = jnp.einsum("nhr,nrck,nwc->hwk", rows, outputs, columns)
    covered = jnp.einsum("nh,nw->hw", (rows.sum(-1) > 0).astype(jnp.float32), (columns.sum(-1) > 0).astype(jnp.float32))
    mean = total / jnp.maximum(covered, 1)[..., None]
    return nn.softmax(mean) if softmax else mean
