"""Small states, and runs that saved them."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from aimv2_jax.config import build_config
from aimv2_jax.train.checkpoint import Checkpointer
from experiments import base

Moments = namedtuple("Moments", ["count", "mu"])


class State(struct.PyTreeNode):
    step: jax.Array
    params: dict
    opt_state: tuple


def make_config(**evaluation):
    tree = base.get_config().to_dict()
    tree["data"]["sources"] = {"photos": "/a/photos"}
    tree["data"]["mixture"] = {"photos": {"alt": 1.0}}
    tree["eval"].update({"sources": {"held_out": "/a/test"}, **evaluation})
    return build_config(tree)


CONFIG = make_config()


def make_state(seed=0, size=16):
    weights = jax.random.normal(jax.random.key(seed), (size, 8))
    params = {"encoder": {"w": weights}, "scale": weights[0].astype(jnp.bfloat16)}
    return State(jnp.int32(seed), params, (Moments(jnp.int32(7), params), None))


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def folders(workdir):
    return sorted(path.name for path in (Path(workdir) / "checkpoints").iterdir())


def save_all(workdir, losses, keep=10):
    """A run whose step s was saved with `losses[s]`."""
    with Checkpointer(workdir, keep) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, make_state(step), CONFIG, loss)


def edit_meta(workdir, step, edit):
    """Changes the meta of a step as if it had been saved so: without a manifest, where that is of format 1."""
    place = Path(workdir) / "checkpoints" / str(step)
    path = place / "meta" / "metadata"
    path.write_text(edit(path.read_text()))
    (place / "manifest.json").unlink(missing_ok=True)


def make_format_1(workdir, step):
    """A step as aimv2_jax wrote it before there were manifests."""
    edit_meta(workdir, step, lambda text: json.dumps({**json.loads(text), "format_version": 1}))
