"""Compares the PyTorch model (torch_model.py) with tensors of the reference: losses, gradients and three steps.

DIR is the folder of golden tensors that `pytest tests/test_golden.py --golden DIR` takes. Everything runs in float64,
in which the reference was computed, so that errors are those of a wrong model and not of rounding.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from aimv2_jax.errors import UserError
from experiments.benchmarks.torch_model import AIMv2, optimizer

# Relative to a tensor's largest entry, and absolute for parameters: the reference is float64 rounded once to float32.
_LARGEST_ERROR = {"losses": 1e-6, "gradients": 1e-6, "parameters": 1e-6}
_ENCODER, _DECODER = "models.image_encoder", "models.text_decoder"
# Parts of the reference's names -> ours, applied in order.
_NAMES = {
    f"{_ENCODER}.preprocessor.blocks.0.patchifier.proj": "patch_embed",
    f"{_ENCODER}.preprocessor.blocks.0.patchifier.norm.weight": "patch_norm.scale",
    f"{_ENCODER}.preprocessor.blocks.0.pos_embed": "position",
    f"{_ENCODER}.trunk": "encoder",
    f"{_DECODER}.preprocessor.vision_preprocessor.module": "image_embed",
    f"{_DECODER}.preprocessor.text_preprocessor.cls_token": "begin",
    f"{_DECODER}.preprocessor.text_preprocessor.positional_embedding": "text_position",
    f"{_DECODER}.preprocessor.text_preprocessor.text_embedding": "token_table",
    f"{_DECODER}.trunk": "decoder",
    f"{_DECODER}.head.blocks.0.linear": "token_head",
    f"{_DECODER}.head.blocks.1.linear": "pixel_head",
    "post_trunk_norm.weight": "norm.scale",
    "attn.q_proj": "query",
    "attn.k_proj": "key",
    "attn.v_proj": "value",
    "attn.proj": "out",
    "mlp.fc1": "gate",
    "mlp.fc3": "up",
    "mlp.fc2": "down",
    "norm_1.weight": "norm_1.scale",
    "norm_2.weight": "norm_2.scale",
}


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.numpy import load_file

    if not path.is_file():
        raise UserError("--golden has no such file", str(path), "Give the folder with pretrain/params.safetensors")
    return {name: torch.from_numpy(array) for name, array in load_file(path).items()}


def _ours(tensors: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The reference's parameters under our names, in our shapes: patches are (row, column, RGB)."""
    ours = {}
    for name, tensor in tensors.items():
        for theirs, own in _NAMES.items():
            name = name.replace(theirs, own)
        tensor = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
        ours[name] = tensor.reshape(shapes[name]).double()
    return ours


def check_golden(folder: Path, device: str) -> dict[str, float]:
    """Returns the largest error of losses, gradients and parameters after three steps; raises UserError beyond bounds.

    The reference leaves out the end of a caption as a target, so that the text mask is that of valid tokens.
    """
    folder = folder / "pretrain"
    batch, params = _read(folder / "batch.safetensors"), _read(folder / "params.safetensors")
    config = json.loads((folder / "config.json").read_text())
    sizes = config["sizes"]
    trunks = [
        dict(width=size["width"], depth=size["depth"], heads=size["heads"], hidden=size["swiglu_hidden"])
        for size in (sizes["encoder"], sizes["decoder"])
    ]
    side = sizes["patch_size"]
    model = AIMv2(
        *trunks, sizes["num_patches"], 3 * side**2, sizes["vocab"], sizes["text_len"], config["rms_norm_eps"],
        config["alpha_image_weight"], config["image_mean"], config["image_std"], config["target_norm"]["eps"],
    )  # fmt: skip
    model = model.double().to(device)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    weights = _ours(params, shapes)
    if set(weights) != set(shapes):
        raise UserError(
            "the reference's tensors are not those of the model", sorted(set(shapes) ^ set(weights)), "Mend _NAMES"
        )
    model.load_state_dict(weights, strict=False)  # The normalisation of pixels is no parameter.
    images = batch["image_uint8_bhwc"]
    patches = images.unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3).flatten(1, 2).flatten(2)
    inputs = patches, batch["text_ids"].long(), batch["text_valid"].bool(), batch["prefix_length"]
    inputs = [x.to(device) for x in inputs]
    settings, losses = config["optimizer"], json.loads((folder / "losses.json").read_text())
    first = settings["steps"][0]
    adam = optimizer(model, 0.0, settings["lr_peak_given_to_constructor"], settings["betas"], settings["eps"],
                     settings["weight_decay"])  # fmt: skip
    worst = dict.fromkeys(_LARGEST_ERROR, 0.0)
    for number, step in enumerate(settings["steps"], 1):
        with torch.autocast(device, enabled=False):
            total, image, text = model(*inputs)
        total.backward()
        if step is first:
            for value, name in ((total, "total_loss"), (image, "image_loss"), (text, "text_loss")):
                worst["losses"] = max(worst["losses"], abs(value.item() / losses[name] - 1))
            theirs = _ours(_read(folder / "grads.safetensors"), shapes)
            for name, p in model.named_parameters():
                error = (p.grad.cpu() - theirs[name]).abs().max() / theirs[name].abs().max()
                worst["gradients"] = max(worst["gradients"], error.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip_global_norm"])
        for group in adam.param_groups:
            group["lr"] = step["lr"]
        adam.step()
        adam.zero_grad()
        theirs = _ours(_read(folder / f"adamlh_step_{number}.safetensors"), shapes)
        for name, p in model.named_parameters():
            worst["parameters"] = max(worst["parameters"], (p.detach().cpu() - theirs[name]).abs().max().item())
    wrong = {name: error for name, error in worst.items() if not error <= _LARGEST_ERROR[name]}
    if wrong:
        raise UserError("the PyTorch model differs from the reference", wrong, "Compare the model with RECIPE.md")
    return worst
