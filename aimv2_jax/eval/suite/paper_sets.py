"""The fourteen sets of Table B1: sizes, accuracies (Table B2), where they come from, and how to prepare them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

SPLITS = ("train", "test")
SIZES = ("L", "H", "1B", "3B")
RESOLUTION = 224
"""Side in pixels of the images behind `PaperSet.scores`."""


@dataclasses.dataclass(frozen=True)
class PaperSet:
    """A set of Table B1.

    Attributes:
      name: its folder under ROOT, with the datasets `train` and `test`.
      train: number of train images in the paper; `test`, `classes` alike.
      scores: top-1 in percent of the paper's L, H, 1B and 3B at 224 px.
      source: where the images come from, and which of their splits the paper's numbers fit.
      inputs: the --input of preparation and its other flags, for train and test.
      listed: the folder for which `source_labels` has to write labels.csv first; "" if it needs none.
    """

    name: str
    title: str
    train: int
    test: int
    classes: int
    scores: tuple[float, float, float, float]
    source: str
    inputs: tuple[str, str]
    listed: str = ""

    def commands(self, root: str, splits: Sequence[str] = SPLITS) -> list[str]:
        """The commands that prepare `splits` of the set under `root`, to be run where its source lies."""
        lists = [f"python -m aimv2_jax.eval.suite.source_labels {self.name} {self.listed}"] if self.listed else []
        return lists + [
            f"python -m aimv2_jax.prepare --input {given} --output {root}/{self.name}/{split}"
            for split, given in zip(SPLITS, self.inputs)
            if split in splits
        ]


def _folders(train: str, test: str) -> tuple[str, str]:
    """Inputs with a folder of images for each class."""
    return f"imagefolder:{train}", f"imagefolder:{test}"


def _hugging_face(folder: str, column: str, test: str = "test") -> tuple[str, str]:
    """Inputs from a Hugging Face dataset on this disk, whose column has the class."""
    train, other = (f"'{folder}' --split {split} --label class={column}" for split in ("train", test))
    return train, other


def _labels(folder: str) -> tuple[str, str]:
    """Inputs from the labels.csv that `source_labels` writes into a folder."""
    train, test = (f"{folder}/labels.csv --split {split} --label class=class" for split in SPLITS)
    return train, test


PAPER_SETS = (
    PaperSet(
        "imagenet", "ImageNet-1k", 1_281_167, 50_000, 1000, (86.6, 87.5, 88.1, 88.5),
        "image-net.org, ILSVRC 2012: train, and val as test, with a folder for each class",
        _folders("imagenet/train", "imagenet/val"),
    ),
    PaperSet(
        "inaturalist18", "iNaturalist-18", 437_513, 24_426, 8142, (76.0, 77.9, 79.7, 81.5),
        "github.com/visipedia/inat_comp/tree/master/2018: train, and val as test",
        _labels("inat2018"), "inat2018",
    ),
    PaperSet(
        "cifar10", "CIFAR-10", 50_000, 10_000, 10, (99.1, 99.3, 99.4, 99.5),
        "huggingface.co/datasets/uoft-cs/cifar10", _hugging_face("cifar10", "label"),
    ),
    PaperSet(
        "cifar100", "CIFAR-100", 50_000, 10_000, 100, (92.2, 93.5, 94.1, 94.3),
        "huggingface.co/datasets/uoft-cs/cifar100", _hugging_face("cifar100", "fine_label"),
    ),
    PaperSet(
        "food101", "Food101", 75_750, 25_250, 101, (95.7, 96.3, 96.7, 96.8),
        "huggingface.co/datasets/ethz/food101: train, and validation as test",
        _hugging_face("food101", "label", "validation"),
    ),
    PaperSet(
        "dtd", "DTD", 3_760, 1_880, 47, (87.9, 88.2, 88.4, 88.9),
        "robots.ox.ac.uk/~vgg/data/dtd: the lists train1 and val1 as train, test1 as test",
        _labels("dtd"), "dtd",
    ),
    PaperSet(
        "pets", "Pets", 3_680, 3_669, 37, (96.3, 96.6, 96.8, 97.1),
        "robots.ox.ac.uk/~vgg/data/pets: the list trainval as train, test as test",
        _labels("pets"), "pets",
    ),
    PaperSet(
        "cars", "Cars", 8_144, 8_041, 196, (96.3, 96.4, 96.5, 96.5),
        "huggingface.co/datasets/tanganke/stanford_cars (the page of Stanford Cars is gone)",
        _hugging_face("stanford_cars", "label"),
    ),
    PaperSet(
        "camelyon17", "Camelyon17", 302_436, 34_904, 2, (93.7, 93.3, 94.2, 93.5),
        "wilds.stanford.edu: train, and val as test, which the paper's sizes are those of",
        _labels("camelyon17_v1.0"), "camelyon17_v1.0",
    ),
    PaperSet(
        "pcam", "PCAM", 262_144, 32_768, 2, (89.3, 89.3, 89.0, 89.4),
        "huggingface.co/datasets/1aurent/PatchCamelyon, or github.com/basveeling/pcam",
        _hugging_face("PatchCamelyon", "label"),
    ),
    PaperSet(
        "rxrx1", "RxRx1", 40_612, 9_854, 1139, (5.6, 5.8, 6.7, 7.3),
        "wilds.stanford.edu: train, and val as test, which the paper's sizes are those of",
        _labels("rxrx1_v1.0"), "rxrx1_v1.0",
    ),
    PaperSet(
        "eurosat", "EuroSAT", 16_200, 5_400, 10, (98.4, 98.5, 98.8, 99.0),
        "github.com/phelber/EuroSAT, RGB, with the lists eurosat-train.txt and eurosat-test.txt of "
        "huggingface.co/datasets/torchgeo/eurosat",
        _labels("eurosat"), "eurosat",
    ),
    PaperSet(
        "fmow", "fMoW", 76_863, 19_915, 62, (60.7, 62.2, 63.2, 64.2),
        "wilds.stanford.edu: train, and val as test, which the paper's sizes are those of",
        _labels("fmow_v1.1"), "fmow_v1.1",
    ),
    PaperSet(
        "infograph", "Infograph", 36_023, 15_582, 345, (69.0, 70.4, 71.7, 72.2),
        "ai.bu.edu/M3SDA, DomainNet: infograph_train.txt and infograph_test.txt",
        _labels("domainnet"), "domainnet",
    ),
)  # fmt: skip

HIGHER_RESOLUTIONS = {
    "imagenet": {336: (87.6, 88.2, 88.7, 89.2), 448: (87.9, 88.6, 89.0, 89.5)},
}
"""Name -> side in pixels -> the paper's accuracies there."""


def paper_scores(paper: PaperSet, image_size: int | None) -> tuple[int, tuple[float, float, float, float]]:
    """The paper's resolution and accuracies to compare with: those at `image_size` if it has them, else at 224 px."""
    higher = HIGHER_RESOLUTIONS.get(paper.name, {})
    if image_size in higher:
        return image_size, higher[image_size]
    return RESOLUTION, paper.scores
