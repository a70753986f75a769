"""Helpers for checkpoint tests: small states, runs that saved them, and edits of saved steps."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import struct

from aimv2_jax.checkpoint import manifest
from aimv2_jax.checkpoint.checkpointer import Checkpointer
from aimv2_jax.config.load import build_config
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
    """Saves a run whose step s has the held-out loss `losses[s]`."""
    with Checkpointer(workdir, keep) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, make_state(step), CONFIG, loss)


def sign_again(workdir, step, **header):
    """Rewrites manifest and hashes of a step for its current files, so that only their reader can detect damage."""
    folder = epath.Path(workdir) / "checkpoints" / str(step)
    signed = manifest.write(folder, {**manifest.read(folder).header, **header})
    hashes = manifest.make_hashes(signed, manifest.hash_files(folder, signed.sizes))
    (folder / manifest.HASHES).write_bytes(hashes.to_bytes())


def edit_meta(workdir, step, edit):
    """Edits the metadata of a step and signs it again."""
    path = Path(workdir) / "checkpoints" / str(step) / "meta" / "metadata"
    path.write_text(edit(path.read_text()))
    sign_again(workdir, step)


def set_format(workdir, step, version):
    """Turns a step into one of another format; format 1 had no manifest."""
    edit_meta(workdir, step, lambda text: json.dumps({**json.loads(text), "format_version": version}))
    sign_again(workdir, step, format_version=version)
    if version < 2:
        (Path(workdir) / "checkpoints" / str(step) / "manifest.json").unlink()
