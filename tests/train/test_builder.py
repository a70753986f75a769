"""`build_setup`: checks of config against devices, and the number of traces."""

from __future__ import annotations

import jax
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.train.builder import build_setup
from tests.helpers.tiny import tiny_config

WIDTHS = dict(model__encoder__width=48, model__decoder__width=48)


@pytest.mark.parametrize("attention", ["auto", "xla", "pallas"])
@pytest.mark.parametrize(
    ("heads", "mesh", "message"),
    [
        ((6, 4), (2, 4), r"mesh\.tensor does not divide model\.encoder\.heads: '4 devices, 6 heads'.* 1 or 2"),
        ((4, 6), (2, -1), r"mesh\.tensor does not divide model\.decoder\.heads: '4 devices, 6 heads'.* 1 or 2"),
        ((2, 2), (1, 8), r"mesh\.tensor does not divide model\.encoder\.heads: '8 devices, 2 heads'.* 1 or 2"),
        ((3, 6), (4, 2), r"mesh\.tensor does not divide model\.encoder\.heads: '2 devices, 3 heads'.* 1 or 3"),
    ],
    ids=["encoder", "decoder, devices that are left", "more devices than heads", "odd"],
)
def test_mesh_when_tensor_cuts_heads_then_refused(attention, heads, mesh, message):
    """A mesh that splits heads is rejected, since a kernel would leave the columns of a split head unwritten."""
    changes = dict(model__encoder__heads=heads[0], model__decoder__heads=heads[1], model__attention=attention)
    config = tiny_config(mesh__data=mesh[0], mesh__tensor=mesh[1], **changes, **WIDTHS)
    with pytest.raises(UserError, match=message):
        build_setup(config)


def test_mesh_when_decoder_has_no_attention():
    """Decoders without attention do not restrict `mesh.tensor`."""
    kind = dict(model__decoder__kind="mlp", model__decoder__heads=1, loss__text=False)
    setup = build_setup(tiny_config(mesh__data=4, mesh__tensor=2, **kind))
    assert setup.mesh.shape["tensor"] == 2
    assert jax.tree.leaves(setup.state_shardings)


def test_program_when_built_then_traces_the_model_once(monkeypatch):
    """The model is traced once, since a trace dominates a start with cached compiles."""
    traced, plain = [], AIMv2.__call__
    monkeypatch.setattr(AIMv2, "__call__", lambda self, *args: (traced.append(None), plain(self, *args))[1])
    setup = build_setup(tiny_config())
    assert setup.abstract_state.params and setup.state_shardings.params
    assert len(traced) == 1
