"""Settings of a dense probe, and those of published configurations by name."""

from __future__ import annotations

import dataclasses
from typing import Literal

Task = Literal["segmentation", "depth"]
SEGMENTATION, DEPTH = "segmentation", "depth"
TASKS = (SEGMENTATION, DEPTH)


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Settings of a dense probe.

    Attributes:
      task: "segmentation" or "depth".
      crop: (height, width) in pixels of the training crops, rounded to whole patches; None: the encoder's square. An
        encoder with an area takes whole images in place of crops and windows.
      window: (height, width) of the windows in evaluation; None: as `crop`.
      stride: distance of neighbouring windows, as a share of a window's side.
      scales: resolutions at which each test image is seen; their probabilities (depths) are averaged.
      flip_test: also average over the mirrored image.
      resize: size of an image at scale 1: "cover", the smallest that covers a crop or window; "none", its own, or
        "cover" if it is smaller.
      scale_range: random scale of train images.
      region: (left, top, right, bottom) of the part of a train image that is used, as shares of its sides.
      flip: probability that a train image is mirrored.
      max_class_share: a train crop is drawn again, ten times at most, while one class has more of its pixels.
      colours: random colours of train images, see `augment.py`.
      steps, batch_size: of the training.
      rate, beta1, beta2, weight_decay, clip: of AdamW and the clipping of gradients; beta1 None: the cycle of `nyuv2`.
      warmup: steps of warm-up.
      warmup_kind: "linear", or "cycle", see `optimizer.learning_rate`.
      final_rate: rate of the last step, as a share of `rate`.
      dropout: probability that a feature is dropped for a whole image in training.
      ignore: label of pixels that do not count.
      zero_is_ignored: label 0 is ignored too, and class c has label c + 1.
      bins: depths between which the head interpolates; 1: it regresses the depth.
      depths: (least, greatest) depth in metres; others do not count.
      units_per_metre: values of a depth map for a metre.
      mask: the pixels that are evaluated, "full" or "eigen".
      seed: of the order, the crops and the head.
    """

    task: Task
    crop: tuple[int, int] | None = None
    window: tuple[int, int] | None = None
    stride: float = 2 / 3
    scales: tuple[float, ...] = (1.0,)
    flip_test: bool = False
    resize: Literal["cover", "none"] = "cover"
    scale_range: tuple[float, float] = (0.5, 2.0)
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    flip: float = 0.5
    max_class_share: float = 1.0
    colours: Literal["none", "photometric", "gamma"] = "none"
    steps: int = 1000
    batch_size: int = 16
    rate: float = 1e-3
    beta1: float | None = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-3
    clip: float | None = None
    warmup: int = 50
    warmup_kind: Literal["linear", "cycle"] = "linear"
    final_rate: float = 0.0
    dropout: float = 0.0
    ignore: int = 255
    zero_is_ignored: bool = False
    bins: int = 256
    depths: tuple[float, float] = (0.001, 10.0)
    units_per_metre: float = 1000.0
    mask: Literal["full", "eigen"] = "full"
    seed: int = 0


# Facts of dinov3's published configs, commit 6876159 (2026-07-15). [O]: ours.
SETTINGS = {
    # dinov3/eval/segmentation/configs/config-ade20k-linear-training.yaml, and defaults of the code that it runs.
    "ade20k": DenseConfig(
        task=SEGMENTATION,
        crop=(512, 512),
        stride=341 / 512,
        scale_range=(0.5, 2.0),
        max_class_share=0.75,
        colours="photometric",
        steps=40_000,
        batch_size=16,  # 2 on each of 8 GPUs.
        rate=1e-3,
        weight_decay=1e-3,
        warmup=1500,
        dropout=0.1,
        zero_is_ignored=True,
    ),
    # dinov3/eval/depth/configs/config-nyu.yaml, likewise.
    "nyuv2": DenseConfig(
        task=DEPTH,
        crop=(416, 544),
        window=(480, 640),
        flip_test=True,
        resize="none",
        scale_range=(1.0, 1.0),
        region=(43 / 640, 45 / 480, 608 / 640, 472 / 480),
        colours="gamma",
        steps=38_400,
        batch_size=16,
        rate=3e-4,
        beta1=None,
        beta2=0.99,
        weight_decay=1e-4,
        clip=35.0,
        warmup=12_800,
        warmup_kind="cycle",
        final_rate=1 / 25_000,
        mask="eigen",
    ),
}
CLASSES = {"ade20k": 150}
DIFFERENCES = {
    "ade20k": "crops of whole patches, bicubic in place of bilinear resizing, padding that is masked in attention, "
    "and the mean loss over the pixels that count",
    "nyuv2": "crops of whole patches, bicubic in place of bilinear resizing, no rotation by up to 2.5 degrees, and one "
    "loss over the batch in place of one a GPU",
}
"""How a probe with these settings differs from dinov3's."""
