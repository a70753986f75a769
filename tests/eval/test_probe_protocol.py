"""The paper's attentive probe (Table A2): its training against PyTorch, its views, and what its command reports."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta

from aimv2_jax.data.transforms.views import RandomCrop
from aimv2_jax.eval.probes import protocol
from aimv2_jax.eval.probes.__main__ import parse_arguments
from aimv2_jax.eval.probes.dataset import read_labelled_dataset
from aimv2_jax.eval.probes.flags import probe_config, reference_config
from aimv2_jax.eval.probes.head_batches import random_view
from aimv2_jax.eval.probes.sweep import GRIDS, AttentiveHead, SweepConfig, epoch_batches, train_sweep
from aimv2_jax.pretrained.images import open_image
from aimv2_jax.pretrained.source import open_weights
from tests.eval.test_probes import data, run  # noqa: F401 (fixture)

WIDTH, HEADS, CLASSES, PATCHES = 32, 4, 4, 6


def class_features(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [N, 1, L, D] around a direction of their class, valid patches, classes."""
    classes = rng.integers(CLASSES, size=count)
    directions = rng.choice([-1, 1], size=(CLASSES, WIDTH))
    features = directions[classes][:, None, None] + rng.normal(size=(count, 1, PATCHES, WIDTH))
    valid = np.arange(PATCHES) < rng.integers(3, PATCHES + 1, size=(count, 1))
    return features.astype(np.float32), valid, classes


class TorchProbe(torch.nn.Module):
    """BatchNorm without affine, a learned query with keys and values of all patches, a linear layer."""

    def __init__(self, params: dict) -> None:
        super().__init__()
        as_parameter = lambda array: torch.nn.Parameter(torch.tensor(np.asarray(array), dtype=torch.float64))  # noqa: E731
        self.norm = torch.nn.BatchNorm1d(WIDTH, eps=1e-6, affine=False, dtype=torch.float64)
        self.query = as_parameter(params["pool"]["query"])
        self.key, self.value = (as_parameter(params["pool"][name]["kernel"]) for name in ("key", "value"))
        self.weight, self.bias = (as_parameter(params["classes"][name]) for name in ("kernel", "bias"))

    def forward(self, features: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        normed = torch.zeros_like(features)
        normed[valid] = self.norm(features[valid])
        keys, values = ((normed @ matrix).unflatten(-1, (HEADS, -1)) for matrix in (self.key, self.value))
        logits = torch.einsum("blhe,he->bhl", keys, self.query.view(HEADS, -1)) / math.sqrt(WIDTH // HEADS)
        weights = logits.masked_fill(~valid[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bhl,blhe->bhe", weights, values).flatten(1) @ self.weight + self.bias


def torch_losses(params: dict, rate: float, decay: float, batches: list, warmup: int, total: int) -> tuple:
    """Losses and gradient norms of one point of the grid by torch's AdamW and clipping, and the trained module."""
    probe = TorchProbe(params)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=decay)
    losses, norms = [], []
    for step, (features, valid, classes) in enumerate(batches):
        progress = (step - warmup) / (total - warmup)
        cosine = 1e-5 + (rate - 1e-5) * (1 + math.cos(math.pi * progress)) / 2
        optimizer.param_groups[0]["lr"] = rate * step / warmup if step < warmup else cosine
        rows = torch.tensor(classes >= 0)
        logits = probe(torch.tensor(features, dtype=torch.float64)[rows], torch.tensor(valid)[rows])
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(classes).long()[rows])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(probe.parameters(), 3.0).item())
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), np.array(norms), probe


@pytest.fixture
def one_torch_thread():
    """Small tensors are ten times as slow with more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("reference", "points"),
    [(protocol.PAPER, slice(None)), (protocol.PAPER_IMAGENET, slice(None, None, 13))],
    ids=["others", "imagenet"],
)
def test_paper_sweep_equals_pytorch(reference, points, one_torch_thread):
    """The losses of 50 steps at each grid point are within 1e-5 of torch's AdamW in float64, where clipping acts.

    With ImageNet's warm-up, those at the first and the last point.
    """
    rng = np.random.default_rng(0)
    features, valid, classes = class_features(rng, 75)
    epochs, size, indices = 10, 16, np.arange(75)
    config = SweepConfig(
        GRIDS[reference.grid][points], epochs, reference.warmup_epochs, size, 0, reference.min_lr, reference.clip_norm,
        reference.decay,
    )  # fmt: skip
    batches = list(epoch_batches(features, valid, classes, indices, config))
    assert len(batches) == 50 and (batches[4][2] == -1).any()  # The last batch of an epoch is padded.
    head = AttentiveHead(HEADS, CLASSES)
    trained = train_sweep(head, None, config, 5, batches, WIDTH)
    params = head.init(jax.random.key(0), jnp.zeros((1, 1, WIDTH)), jnp.ones((1, 1), bool))["params"]
    clipped = 0
    for point, (rate, decay) in enumerate(config.grid):
        losses, norms, probe = torch_losses(meta.unbox(params), rate, decay, batches, 5 * config.warmup_epochs, 50)
        np.testing.assert_allclose(trained.losses[:, point], losses, rtol=0, atol=1e-5)
        clipped += (norms > 3).sum()
    assert trained.losses.shape == (50, len(config.grid)) and trained.losses[-1].min() < 0.5 * trained.losses[0].max()
    assert clipped > len(config.grid)
    # The running averages do not depend on the head.
    np.testing.assert_allclose(trained.norm.mean, probe.norm.running_mean, atol=1e-6)
    np.testing.assert_allclose(trained.norm.inv_std, (probe.norm.running_var + 1e-6) ** -0.5, rtol=1e-5)


def test_paper_grid_is_table_a2():
    """The grid, its schedule, clipping, batches and warm-up are those of Table A2."""
    rates = {5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3}
    assert set(GRIDS[protocol.PAPER.grid]) == {(rate, decay) for rate in rates for decay in (0.05, 0.1)}
    expected = dict(epochs=100, min_lr=1e-5, clip_norm=3.0, augment="randaugment", kind="attentive", validation=None)
    for config, batch_size, warmup in ((protocol.PAPER, 512, 0), (protocol.PAPER_IMAGENET, 1024, 5)):
        assert expected.items() <= dataclasses.asdict(config).items()
        assert (config.batch_size, config.warmup_epochs) == (batch_size, warmup)


def test_paper_views_are_augmented_crops(workdir, data):  # noqa: F811
    """A view is the crop of its example, changed by RandAugment and colour jitter; it depends on (seed, example)."""
    dataset = read_labelled_dataset(str(data / "train"), "--train", "color", None, ())
    spec = open_weights(workdir).spec
    plain, augmented = (random_view(spec, 3, on) for on in (False, True))
    image, changed = dataset.image(0), 0
    opened = open_image(image)
    for example in range(20):
        crop = RandomCrop(3, spec.image_size, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)(opened.size, example)
        np.testing.assert_array_equal(plain(image, example), crop(opened))
        view = augmented(image, example)
        assert view.shape == (32, 32, 3) and view.dtype == np.uint8
        np.testing.assert_array_equal(view, augmented(image, example))
        changed += not np.array_equal(view, plain(image, example))
    assert changed == 20
    assert not np.array_equal(augmented(image, 0), random_view(spec, 4, True)(image, 0))


def test_paper_protocol_reports_what_differs(workdir, data, tmp_path, capsys):  # noqa: F811
    """The best of the grid on the test images is reported, with what differs from the paper and what it leaves open."""
    flags = ["--protocol=paper", "--epochs=2", f"--json={tmp_path}/paper.json", "--no-floor"]
    assert run(workdir, data, *flags) == 0
    result, out = json.loads((tmp_path / "paper.json").read_text()), capsys.readouterr().out
    assert len(result["grid"]) == 14 and result["top1"] == max(point["top1"] for point in result["grid"])
    assert result["best"]["test_top1"] == result["top1"] and result["examples"]["validation"] == 0
    differs = result["protocol"]["differs"]
    assert "epochs 2 (paper: 100)" in differs and any("all train images (paper: 512)" in line for line in differs)
    assert len(differs) == 3 and result["protocol"]["not_stated"] == list(protocol.NOT_STATED)
    for line in (*differs, *protocol.NOT_STATED, "Table A2, sets other than ImageNet-1k", "best of 14 grid points"):
        assert line in out


def test_changed_settings_are_named():
    """Each flag that changes the paper's setting is named with both values."""
    required = ["--checkpoint=x", "--train=x", "--test=x", "--label=x", "--protocol=paper", "--imagenet"]
    changes = ["--validation=0.2", "--no-refit", "--augment=flip", "--warmup-epochs=0", "--layer=3", "--no-normalise"]
    flags = parse_arguments([*required, *changes])
    config = probe_config(flags, reference_config(flags.protocol, flags.imagenet))
    notes = protocol.protocol_notes(config, protocol.PAPER_IMAGENET, 10**6, 1000)
    assert notes["differs"][1:] == [
        "layer 3 (paper: after the final norm)",
        "augmentation flip (paper: randaugment)",
        "warm-up epochs 0 (paper: 5)",
        "normalisation none (paper: batch)",
        "the best point is chosen on 20% of the train images",
    ]
    assert "ImageNet-1k" in notes["name"] and "give --imagenet" not in notes["name"]
    refit = protocol.protocol_notes(dataclasses.replace(config, refit=True), protocol.PAPER_IMAGENET, 10**6, 1000)
    assert refit["differs"][-1].endswith("and its head trained again on all of them")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--imagenet"], "--imagenet goes with --protocol paper"),
        (["--protocol=paper", "--kind=linear"], "--protocol paper is an attentive probe"),
        (["--protocol=paper", "--cache=kept"], "--augment randaugment stores no features"),
        (["--protocol=exact"], "invalid choice: 'exact'"),
    ],
)
def test_protocol_flags_user_errors(workdir, data, capsys, flags, sentence):  # noqa: F811
    """Flags that contradict the protocol end with one line and code 2."""
    with pytest.raises(SystemExit) as error:
        run(workdir, data, *flags)
    assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_paper_protocol_notes_a_thousand_classes():
    """A set with ImageNet's number of classes is asked about, unless --imagenet is given."""
    for reference, asked in ((protocol.PAPER, True), (protocol.PAPER_IMAGENET, False)):
        notes = protocol.protocol_notes(reference, reference, 10**6, 1000)
        assert ("give --imagenet" in notes["name"]) == asked
        assert notes["differs"] == ["features are rounded to float16 before the head"]
    assert protocol.notes_text(protocol.protocol_notes(protocol.QUICK, protocol.QUICK, 10, 3)).count("\n") == 0
