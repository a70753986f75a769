"""Miniatures of the sources of Table B1's sets: the publishers' files and columns, and the examples that they hold.

Each function writes the source into a folder, and returns for train and for test the class of each image's bytes.
Each source also has images that belong to neither, where the publisher's has some.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image

from tests.helpers.labelled_sets import IMAGE, table

Examples = dict[str, dict[bytes, str]]
"""Split -> bytes of an image -> its class."""
_numbers = itertools.count()


def picture(side: int = 40, format: str = "JPEG") -> bytes:
    """A new image of noise."""
    file = io.BytesIO()
    noise = np.random.default_rng(next(_numbers)).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(file, format)
    return file.getvalue()


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], index: bool = False) -> None:
    """A table as pandas writes it, with its unnamed index column if wanted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([""] * index + list(rows[0]))
    writer.writerows([number] * index + list(row.values()) for number, row in enumerate(rows))
    write(path, text.getvalue())


def imagenet(folder: Path) -> Examples:
    """ILSVRC 2012, as torchvision's ImageNet and ImageFolder read it: train/WNID/WNID_N.JPEG, val/WNID/..."""
    found: Examples = {"train": {}, "test": {}}
    for split, name in (("train", "train"), ("test", "val")):
        for wnid in ("n01440764", "n01443537"):
            data = picture()
            write(folder / "imagenet" / name / wnid / f"{wnid}_{next(_numbers)}.JPEG", data)
            found[split][data] = wnid
    return found


def inaturalist18(folder: Path) -> Examples:
    """visipedia/inat_comp, 2018/README: COCO's JSON, images below train_val2018/SUPERCATEGORY/CATEGORY."""
    found: Examples = {"train": {}, "test": {}}
    for split, name in (("train", "train2018.json"), ("test", "val2018.json")):
        images, annotations = [], []
        for category in (7477, 12):
            number, data = next(_numbers), picture()
            file_name = f"train_val2018/Plantae/{category}/{number:032x}.jpg"
            write(folder / "inat2018" / file_name, data)
            images.append({"license": 3, "file_name": file_name, "height": 40, "width": 40, "id": number})
            annotations.append({"image_id": number, "category_id": category, "id": number})
            found[split][data] = str(category)
        categories = [{"id": 12, "name": "12", "supercategory": "Plantae"}]
        # The order of annotations is not that of the images.
        tree = {"images": images, "annotations": annotations[::-1], "categories": categories}
        write(folder / "inat2018" / name, json.dumps(tree))
    return found


def _parquet(folder: Path, stems: Mapping[str, str | None], image: str, labels: Mapping[str, object]) -> Examples:
    """A repository of parquet files, their stems with the split that they belong to; the first label is the class."""
    found: Examples = {"train": {}, "test": {}}
    for stem, split in stems.items():
        images = [picture(32, "PNG"), picture(32, "PNG")]
        columns: dict[str, Sequence[object]] = {image: images}
        features: dict[str, object] = {image: IMAGE}
        for name, feature in labels.items():
            columns[name] = [True, False] if feature is bool else [1, 0]
            features[name] = {"dtype": "bool", "_type": "Value"} if feature is bool else feature
        path = folder / f"{stem}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table(features, columns), path)
        feature = next(iter(labels.values()))
        names = ["false", "true"] if feature is bool else feature["names"]
        if split is not None:
            found[split] |= {images[0]: names[1], images[1]: names[0]}
    write(folder / "README.md", "---\nlicense: unknown\n---\n")
    return found


def _classes(*names: str) -> dict[str, object]:
    return {"names": list(names), "_type": "ClassLabel"}


def cifar10(folder: Path) -> Examples:
    """huggingface.co/datasets/uoft-cs/cifar10: columns img and label, configuration plain_text."""
    stems = {f"plain_text/{split}-00000-of-00001": split for split in ("train", "test")}
    return _parquet(folder / "cifar10", stems, "img", {"label": _classes("airplane", "automobile")})


def cifar100(folder: Path) -> Examples:
    """huggingface.co/datasets/uoft-cs/cifar100: columns img, fine_label and coarse_label."""
    stems = {f"cifar100/{split}-00000-of-00001": split for split in ("train", "test")}
    labels = {"fine_label": _classes("apple", "aquarium_fish"), "coarse_label": _classes("aquatic_mammals", "fish")}
    return _parquet(folder / "cifar100", stems, "img", labels)


def food101(folder: Path) -> Examples:
    """huggingface.co/datasets/ethz/food101: the splits train and validation, several files each."""
    stems = {f"data/train-0000{number}-of-00002": "train" for number in range(2)}
    stems |= {f"data/validation-0000{number}-of-00002": "test" for number in range(2)}
    return _parquet(folder / "food101", stems, "image", {"label": _classes("apple_pie", "baby_back_ribs")})


def cars(folder: Path) -> Examples:
    """huggingface.co/datasets/tanganke/stanford_cars: columns image and label."""
    stems = {f"data/{split}-00000-of-00001": split for split in ("train", "test")}
    names = _classes("AM General Hummer SUV 2000", "Acura RL Sedan 2012")
    return _parquet(folder / "stanford_cars", stems, "image", {"label": names})


def pcam(folder: Path) -> Examples:
    """huggingface.co/datasets/1aurent/PatchCamelyon: truth values as labels, hashes in the names, a split valid."""
    stems = {
        "data/train-00000-of-00001-4717c3cf92578c96": "train",
        "data/valid-00000-of-00001-0e1a29e0620125c6": None,
        "data/test-00000-of-00001-bb04e6313f58efa0": "test",
    }
    return _parquet(folder / "PatchCamelyon", stems, "image", {"label": bool})


def dtd(folder: Path) -> Examples:
    """dtd-r1.0.1, as torchvision's dtd.py reads it: labels/train1.txt has lines CLASS/IMAGE; other partitions too."""
    found: Examples = {"train": {}, "test": {}}
    for split, name in (("train", "train1"), ("train", "val1"), ("test", "test1")):
        lines = []
        for label in ("banded", "zigzagged"):
            image, data = f"{label}/{label}_{next(_numbers):04}.jpg", picture()
            write(folder / "dtd/images" / image, data)
            lines.append(image)
            found[split][data] = label
        write(folder / f"dtd/labels/{name}.txt", "\n".join(lines) + "\n")
        write(folder / f"dtd/labels/{name.replace('1', '2')}.txt", "banded/another_partition.jpg\n")
    return found


def pets(folder: Path) -> Examples:
    """The Oxford-IIIT pets, as torchvision's oxford_iiit_pet.py reads them: lines IMAGE CLASS SPECIES BREED."""
    found: Examples = {"train": {}, "test": {}}
    for split, name in (("train", "trainval"), ("test", "test")):
        lines = []
        for number, label in enumerate(("Abyssinian", "american_bulldog"), 1):
            image, data = f"{label}_{next(_numbers)}", picture()
            write(folder / f"pets/images/{image}.jpg", data)
            lines.append(f"{image} {number} {number} 1")
            found[split][data] = label
        write(folder / f"pets/annotations/{name}.txt", "\n".join(lines) + "\n")
    write(folder / "pets/annotations/list.txt", "#Image CLASS-ID SPECIES BREED ID\n")
    write(folder / "pets/images/Abyssinian_100.mat", b"\x00")
    return found


def camelyon17(folder: Path) -> Examples:
    """p-lambda/wilds, camelyon17_dataset.py: the split column holds for hospitals 0, 3 and 4; 1 is val, 2 is test."""
    found: Examples = {"train": {}, "test": {}}
    rows = []
    cases = [("004", 0, 0, "train"), ("010", 0, 3, "train"), ("012", 0, 3, "train"), ("013", 1, 4, None)]
    cases += [("024", 0, 1, "test"), ("030", 1, 1, "test"), ("042", 0, 2, None)]
    for tumor, (patient, split, center, belongs) in enumerate(cases):
        row = {"patient": patient, "node": 4, "x_coord": 3328 + tumor, "y_coord": 21792, "tumor": tumor % 2}
        row |= {"slide": tumor, "center": center, "split": split}
        slide, data = f"patient_{patient}_node_4", picture(96, "PNG")
        write(folder / f"camelyon17_v1.0/patches/{slide}/patch_{slide}_x_{3328 + tumor}_y_21792.png", data)
        rows.append(row)
        if belongs is not None:
            found[belongs][data] = str(tumor % 2)
    write_csv(folder / "camelyon17_v1.0/metadata.csv", rows, index=True)
    return found


def rxrx1(folder: Path) -> Examples:
    """p-lambda/wilds, rxrx1_dataset.py: train is site 1 of the train experiments, val both sites of its own."""
    found: Examples = {"train": {}, "test": {}}
    rows = []
    for dataset, experiment in (("train", "HEPG2-01"), ("val", "HEPG2-08"), ("test", "U2OS-04")):
        for well, site, sirna in (("B02", 1, 1138), ("B02", 2, 1138), ("B03", 1, 12)):
            row = {"site_id": f"{experiment}_1_{well}_{site}", "well_id": f"{experiment}_1_{well}"}
            row |= {"cell_type": experiment[:-3], "dataset": dataset, "experiment": experiment, "plate": 1}
            row |= {"well": well, "site": site, "well_type": "treatment", "sirna": "s1", "sirna_id": sirna}
            rows.append(row)
            data = picture(48, "PNG")
            write(folder / f"rxrx1_v1.0/images/{experiment}/Plate1/{well}_s{site}.png", data)
            split = {"train": "train", "val": "test"}.get(dataset)
            if split is not None and not (split == "train" and site == 2):
                found[split][data] = str(sirna)
    write_csv(folder / "rxrx1_v1.0/metadata.csv", rows)
    return found


def eurosat(folder: Path) -> Examples:
    """2750/CLASS/CLASS_N.jpg, as torchvision's eurosat.py reads it; torchgeo's lists have lines CLASS_N.jpg."""
    found: Examples = {"train": {}, "test": {}}
    for name in ("train", "val", "test"):
        lines = []
        for label in ("AnnualCrop", "SeaLake"):
            image, data = f"{label}_{next(_numbers)}.jpg", picture(64)
            write(folder / f"eurosat/2750/{label}/{image}", data)
            lines.append(image)
            if name in found:
                found[name][data] = label
        write(folder / f"eurosat/eurosat-{name}.txt", "\n".join(lines) + "\n")
    return found


def fmow(folder: Path) -> Examples:
    """p-lambda/wilds, fmow_dataset.py: images by row number; official splits by split and time."""
    found: Examples = {"train": {}, "test": {}}
    cases = [
        ("train", "2012-12-31T23:59:59Z", "train"),
        ("seq", "2010-01-01T10:00:00Z", None),
        ("train", "2002-04-03T10:00:00Z", "train"),
        ("train", "2013-01-01T00:00:00Z", None),
        ("val", "2013-01-01T00:00:00Z", "test"),
        ("val", "2015-12-31T23:59:59Z", "test"),
        ("val", "2016-01-01T00:00:00Z", None),
        ("val", "2012-06-01T00:00:00Z", None),
        ("test", "2016-05-01T00:00:00Z", None),
    ]
    rows = []
    for number, (split, timestamp, belongs) in enumerate(cases):
        category = ("airport", "zoo")[number // 2 % 2]
        rows.append({"split": split, "category": category, "country_code": "USA", "timestamp": timestamp})
        data = picture(64, "PNG")
        write(folder / f"fmow_v1.1/images/rgb_img_{number}.png", data)
        if belongs is not None:
            found[belongs][data] = category
    write_csv(folder / "fmow_v1.1/rgb_metadata.csv", rows)
    return found


def infograph(folder: Path) -> Examples:
    """DomainNet, as pytorch-adapt's domainnet.py reads it: lines PATH NUMBER below one folder for each domain."""
    found: Examples = {"train": {}, "test": {}}
    for split in found:
        lines = []
        for number, label in enumerate(("aircraft_carrier", "zigzag")):
            path, data = f"infograph/{label}/infograph_{number:03}_{next(_numbers):06}.jpg", picture()
            write(folder / "domainnet" / path, data)
            lines.append(f"{path} {number}")
            found[split][data] = label
        write(folder / f"domainnet/infograph_{split}.txt", "\n".join(lines) + "\n")
    return found


SOURCES: dict[str, Callable[[Path], Examples]] = {
    source.__name__: source
    for source in (
        imagenet, inaturalist18, cifar10, cifar100, food101, dtd, pets, cars, camelyon17, pcam, rxrx1, eurosat, fmow,
        infograph,
    )
}  # fmt: skip
"""Name of a set of Table B1 -> the function that writes its source."""
