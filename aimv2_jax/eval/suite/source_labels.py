"""Writes labels.csv beside the images of a set of Table B1 whose publisher gives lists or tables of its own.

    python -m aimv2_jax.eval.suite.source_labels NAME FOLDER

FOLDER is the publisher's archive, unpacked; NAME is one of

inaturalist18  train2018.json, val2018.json, and the images that they name below train_val2018
dtd            labels/train1.txt, val1.txt and test1.txt, and images
pets           annotations/trainval.txt and test.txt, and images
camelyon17     WILDS: metadata.csv, and patches. Hospital 1 is the test set: WILDS's validation set
rxrx1          WILDS: metadata.csv, and images. Site 1 of the train experiments; the validation experiments are the test
eurosat        2750 of EuroSAT.zip, and eurosat-train.txt and eurosat-test.txt beside it
fmow           WILDS: rgb_metadata.csv, and images. Before 2013; the validation images from 2013 to 2015 are the test
infograph      infograph_train.txt, infograph_test.txt, and infograph

FOLDER/labels.csv has the columns path, class and split (train and test), for aimv2_jax.prepare --split. Images that
belong to neither are left out.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from aimv2_jax.cli import Parser
from aimv2_jax.console import print_line
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.eval.suite.paper_sets import SPLITS
from aimv2_jax.storage.files import atomic_write
from aimv2_jax.untrusted import parse_json_object, read_file

LABELS_FILE = "labels.csv"
TRAIN, TEST = SPLITS
_MAX_BYTES = 1 << 30  # The largest, train2018.json, has about 130 MB.
# WILDS numbers the hospitals of Camelyon17 from 0: 1 is its validation set, 2 its test set.
_CAMELYON_VALIDATION, _CAMELYON_TEST = 1, 2
# WILDS divides fMoW by time: train before 2013, validation before 2016, test after that.
_FMOW_VALIDATION_YEAR, _FMOW_TEST_YEAR = 2013, 2016


class Labelled(NamedTuple):
    """An image's path in the folder, its class, and its split, which is `TRAIN` or `TEST`."""

    path: str
    label: str
    split: str


def _lines(file: Path) -> Iterator[str]:
    return (line for line in read_file(file, _MAX_BYTES).decode().splitlines() if line.strip())


def _rows(file: Path) -> Iterator[dict[str, str]]:
    return iter(csv.DictReader(io.StringIO(read_file(file, _MAX_BYTES).decode(), newline=""), strict=True))


def _inaturalist18(folder: Path) -> Iterator[Labelled]:
    for split, name in ((TRAIN, "train2018.json"), (TEST, "val2018.json")):
        tree = parse_json_object(read_file(folder / name, _MAX_BYTES))
        files = {image["id"]: image["file_name"] for image in tree["images"]}
        for entry in tree["annotations"]:
            yield Labelled(files[entry["image_id"]], str(entry["category_id"]), split)


def _dtd(folder: Path) -> Iterator[Labelled]:
    for split, name in ((TRAIN, "train1.txt"), (TRAIN, "val1.txt"), (TEST, "test1.txt")):
        for line in _lines(folder / "labels" / name):
            label, _ = line.strip().split("/")
            yield Labelled(f"images/{line.strip()}", label, split)


def _pets(folder: Path) -> Iterator[Labelled]:
    for split, name in ((TRAIN, "trainval.txt"), (TEST, "test.txt")):
        for line in _lines(folder / "annotations" / name):
            image, *numbers = line.split()
            if len(numbers) != 3:
                raise ValueError(f"a line without three numbers: {line!r}")
            yield Labelled(f"images/{image}.jpg", image.rpartition("_")[0], split)


def _camelyon17(folder: Path) -> Iterator[Labelled]:
    for row in _rows(folder / "metadata.csv"):
        slide, center = f"patient_{row['patient']}_node_{row['node']}", int(row["center"])
        # The column split is of the other hospitals' patches: 0 is train, 1 validation on the same hospitals.
        is_train = int(row["split"]) == 0 and center not in (_CAMELYON_VALIDATION, _CAMELYON_TEST)
        if is_train or center == _CAMELYON_VALIDATION:
            path = f"patches/{slide}/patch_{slide}_x_{row['x_coord']}_y_{row['y_coord']}.png"
            yield Labelled(path, row["tumor"], TRAIN if is_train else TEST)


def _rxrx1(folder: Path) -> Iterator[Labelled]:
    for row in _rows(folder / "metadata.csv"):
        is_train = row["dataset"] == "train" and row["site"] == "1"
        if is_train or row["dataset"] == "val":
            path = f"images/{row['experiment']}/Plate{row['plate']}/{row['well']}_s{row['site']}.png"
            yield Labelled(path, row["sirna_id"], TRAIN if is_train else TEST)


def _eurosat(folder: Path) -> Iterator[Labelled]:
    for split, name in ((TRAIN, "eurosat-train.txt"), (TEST, "eurosat-test.txt")):
        for line in _lines(folder / name):
            image = line.strip()
            label = image.rpartition("_")[0]
            yield Labelled(f"2750/{label}/{image}", label, split)


def _fmow(folder: Path) -> Iterator[Labelled]:
    for number, row in enumerate(_rows(folder / "rgb_metadata.csv")):
        year = int(row["timestamp"][:4])
        is_train = row["split"] == "train" and year < _FMOW_VALIDATION_YEAR
        if is_train or (row["split"] == "val" and _FMOW_VALIDATION_YEAR <= year < _FMOW_TEST_YEAR):
            yield Labelled(f"images/rgb_img_{number}.png", row["category"], TRAIN if is_train else TEST)


def _infograph(folder: Path) -> Iterator[Labelled]:
    for split in (TRAIN, TEST):
        for line in _lines(folder / f"infograph_{split}.txt"):
            path, _ = line.strip().rsplit(" ", 1)
            yield Labelled(path, path.split("/")[1], split)


READERS: dict[str, Callable[[Path], Iterator[Labelled]]] = {
    "inaturalist18": _inaturalist18,
    "dtd": _dtd,
    "pets": _pets,
    "camelyon17": _camelyon17,
    "rxrx1": _rxrx1,
    "eurosat": _eurosat,
    "fmow": _fmow,
    "infograph": _infograph,
}
"""Name of a set in Table B1 -> reader of its publisher's lists."""


def write_labels(name: str, folder: Path) -> Counter[str]:
    """Writes `LABELS_FILE` into a set's folder, and returns the number of images of each split.

    Raises:
      UserError: if a list of the publisher is missing or has another layout, or a split has no image.
    """
    remedy = f"Give the folder of {name}, with the files that --help names"
    try:
        labelled = list(READERS[name](folder))
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}", str(error.filename or folder), remedy) from error
    except KeyError as error:
        raise UserError(f"{name}: its lists lack a column or an entry", error.args[0], remedy) from error
    except (ValueError, TypeError, IndexError, csv.Error) as error:
        raise UserError(f"{name}: its lists have another layout ({error})", str(folder), remedy) from error
    counts = Counter(entry.split for entry in labelled)
    for split in (TRAIN, TEST):
        if not counts[split]:
            raise UserError(f"{name}: its lists have no image of the split", split, remedy)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "class", "split"))
    writer.writerows(labelled)
    atomic_write(folder / LABELS_FILE, text.getvalue().encode())
    return counts


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.suite.source_labels", description=summary, epilog=epilog)
    parser.add_argument("name", choices=tuple(READERS), metavar="NAME", help="the set")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the publisher's archive, unpacked")
    flags = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    counts = write_labels(flags.name, flags.folder)
    print_line(f"{flags.folder / LABELS_FILE}: {counts[TRAIN]:,} train and {counts[TEST]:,} test images")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
