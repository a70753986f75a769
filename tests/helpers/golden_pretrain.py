"""The pretrain/ directory of golden tensors as task, batch and parameters of ours. Needs no pytest."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from safetensors.numpy import load_file

from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.models.attention import Implementation
from aimv2_jax.models.decoder import Decoder
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.layers import TrunkOptions
from aimv2_jax.train.pretrain_task import PretrainTask
from tests.helpers.golden_names import APPLE_PRETRAIN, nested, to_ours


def read_json(path: Path) -> dict:
    assert path.is_file(), f"golden file missing: {path}"
    return json.loads(path.read_text())


def read_tensors(path: Path, expected: set[str]) -> dict[str, np.ndarray]:
    assert path.is_file(), f"golden file missing: {path}"
    tensors = load_file(path)
    missing = expected - set(tensors)
    assert not missing, f"{path} lacks {sorted(missing)}"
    return tensors


class Pretrain:
    """Sizes, batch and parameters of the pretrain/ directory, in our format."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_json(directory / "config.json")
        sizes = self.config["sizes"]
        self.sizes = sizes
        self.length, self.text = sizes["num_patches"], sizes["text_len"]

    def names(self) -> set[str]:
        return set(self.config["optimizer"]["decayed"])

    def ours(self, file: str, prefix: str = "") -> dict[str, np.ndarray]:
        tensors = read_tensors(self.directory / file, {prefix + name for name in self.names()})
        return to_ours({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, APPLE_PRETRAIN)

    @cached_property
    def params(self) -> dict:
        return jax.tree.map(jnp.asarray, nested(self.ours("params.safetensors")))

    @cached_property
    def raw_batch(self) -> dict[str, np.ndarray]:
        keys = {
            "image_loss_mask",
            "image_normalised_bchw",
            "image_uint8_bhwc",
            "prefix_length",
            "text_ids",
            "text_valid",
        }
        return read_tensors(self.directory / "batch.safetensors", keys)

    @cached_property
    def batch(self) -> dict[str, jax.Array]:
        raw, (rows, columns), side = self.raw_batch, self.sizes["grid_height_width"], self.sizes["patch_size"]
        size = len(raw["text_ids"])
        images = raw["image_uint8_bhwc"]
        patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=side, q=side)
        coords = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(1, -1, 2)
        batch = {
            "patches": patches,
            "coords": np.broadcast_to(coords, (size, *coords.shape[1:])).astype(np.int32),
            "valid": np.ones((size, self.length), bool),
            "tokens": raw["text_ids"],
            "token_valid": raw["text_valid"].astype(bool),
            "example_index": np.zeros((size, 2), np.uint32),
        }
        return jax.tree.map(jnp.asarray, batch)

    @property
    def prefix(self) -> np.ndarray:
        return self.raw_batch["prefix_length"]

    def task(
        self, layers: str, remat: str, predict_eos: bool = False, attention: Implementation = "xla"
    ) -> PretrainTask:
        config, sizes = self.config, self.sizes
        shared = {"eps": config["rms_norm_eps"], "options": TrunkOptions(layers, remat, attention)}

        def trunk(size):
            return {
                "width": size["width"],
                "depth": size["depth"],
                "heads": size["heads"],
                "hidden": size["swiglu_hidden"],
            }

        model = AIMv2(
            Encoder(**trunk(sizes["encoder"]), num_patches=self.length, **shared),
            Decoder(
                **trunk(sizes["decoder"]),
                encoder_width=sizes["encoder"]["width"],
                pixels=self.batch["patches"].shape[-1],
                vocab_size=sizes["vocab"],
                text_length=self.text,
                **shared,
            ),
        )
        return PretrainTask(
            model=model,
            weights={"image": config["alpha_image_weight"], "text": config["text_weight"]},
            predict_eos=predict_eos,
            target_eps=config["target_norm"]["eps"],
            pixel_mean=tuple(config["image_mean"]),
            pixel_std=tuple(config["image_std"]),
        )
