"""The sets under one ROOT: those of Table B1, further ones that a `set.json` describes, and what is missing."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from aimv2_jax.data.dataset_info import DATASET_FILE
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import UserError
from aimv2_jax.eval.probes.dataset import LabelledDataset, read_labelled_dataset
from aimv2_jax.eval.suite.paper_sets import PAPER_SETS, SPLITS, PaperSet
from aimv2_jax.untrusted import parse_json_object, read_file

SET_FILE = "set.json"
_MAX_SET_FILE_BYTES = 1 << 20
_DEFAULT_LABEL = "class"


@dataclasses.dataclass(frozen=True)
class Description:
    """Contents of `ROOT/NAME/set.json`, all of it optional.

    Attributes:
      title: the set's name in tables; default: that of its folder.
      label: the label to predict; default: the only one of the datasets, or "class".
      without: excluded values of the label.
      classes: names of the classes for zero-shot classification, as for `eval.zeroshot --classes`.
      templates: a file of templates as for `eval.zeroshot --templates`.
    """

    title: str | None = None
    label: str | None = None
    without: tuple[str, ...] = ()
    classes: str | None = None
    templates: str | None = None


@dataclasses.dataclass(frozen=True)
class SuiteSet:
    """A set under ROOT; `paper` is None for one that is not in Table B1."""

    name: str
    folder: Path
    description: Description
    paper: PaperSet | None

    @property
    def title(self) -> str:
        return self.description.title or (self.paper.title if self.paper else self.name)

    def identity(self) -> str:
        """Identifies the datasets, by their dataset.json with its checksum of all records, and the description.

        Raises:
          UserError: for a set without one of its datasets.
        """
        content = hashlib.sha256(repr(self.description).encode())
        for split in SPLITS:
            file = self.folder / split / DATASET_FILE
            if not file.is_file():
                present = next((other for other in SPLITS if (self.folder / other / DATASET_FILE).is_file()), None)
                what = f"the set {self.name} is only half there: {split} is no prepared dataset"
                raise UserError(what, str(file.parent), _remedy(self, present))
            content.update(hashlib.sha256(file.read_bytes()).digest())
        return content.hexdigest()[:32]

    def read(self) -> tuple[LabelledDataset, LabelledDataset]:
        """The labelled train and test images.

        Raises:
          UserError: for a damaged or unlabelled dataset, a class in test that train lacks, only one class, or labels
            outside of the classes of Table B1.
        """
        label = self.description.label
        parts: list[LabelledDataset] = []
        for split in SPLITS:
            path, names = str(self.folder / split), parts[0].names if parts else None
            label = label or _only_label(path, split)
            exclude = f"without in {self.name}/{SET_FILE}"
            parts.append(read_labelled_dataset(path, split, label, None, self.description.without, names, exclude))
        if self.paper is not None:
            _check_range(self.paper, parts[0].names)
        return parts[0], parts[1]

    def size_notes(self, train: int, test: int, classes: int) -> list[str]:
        """How the set's numbers of images and classes differ from the paper's."""
        if self.paper is None:
            return []
        ours, theirs = (train, test, classes), (self.paper.train, self.paper.test, self.paper.classes)
        return [
            f"{have:,} {what} (paper: {expected:,})"
            for have, expected, what in zip(ours, theirs, ("train images", "test images", "classes"))
            if have != expected
        ]


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Sets that are there, those of Table B1 that are missing, and folders that are neither."""

    sets: tuple[SuiteSet, ...]
    missing: tuple[PaperSet, ...]
    ignored: tuple[str, ...]


def find_sets(root: Path) -> Catalogue:
    """Lists the sets in the folders of `root`, those of Table B1 first and in its order.

    Raises:
      UserError: if `root` is no folder, has no set, or has a `set.json` that cannot be understood.
    """
    if not root.is_dir():
        raise UserError("--data: no such folder", str(root), "Give a folder with NAME/train and NAME/test")
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    papers = {paper.name: paper for paper in PAPER_SETS}
    described = [name for name in folders if name not in papers and (folders[name] / SET_FILE).is_file()]
    sets = tuple(
        SuiteSet(name, folders[name], _read_description(folders[name] / SET_FILE), papers.get(name))
        for name in [*(name for name in papers if name in folders), *described]
    )
    if not sets:
        known = ", ".join(papers)
        raise UserError("--data has no set", str(root), f"Prepare one of {known}, or describe yours by NAME/{SET_FILE}")
    missing = tuple(paper for paper in PAPER_SETS if paper.name not in folders)
    known_names = {entry.name for entry in sets}
    return Catalogue(sets, missing, tuple(name for name in folders if name not in known_names))


def _read_description(file: Path) -> Description:
    if not file.is_file():
        return Description()
    remedy = "Its keys are title, label, without (a list), classes, templates"
    try:
        tree = parse_json_object(read_file(file, _MAX_SET_FILE_BYTES))
    except ValueError as error:
        raise UserError(f"the set's description is not JSON ({error})", str(file), remedy) from error
    without = tree.pop("without", [])
    known = {field.name for field in dataclasses.fields(Description)} - {"without"}
    for key, value in tree.items():
        if key not in known:
            raise UserError(f"{file} has an unknown key", key, remedy)
        if not isinstance(value, str) or not value:
            raise UserError(f"{file}: {key} is not a text", value, "Give a text")
    if not isinstance(without, list) or not all(isinstance(value, str) for value in without):
        raise UserError(f"{file}: without is not a list of texts", without, "Give a list of labels")
    return Description(**tree, without=tuple(without))


def _only_label(path: str, split: str) -> str:
    labels = Source(path, path, split).info.labels
    return labels[0] if len(labels) == 1 else _DEFAULT_LABEL


def _check_range(paper: PaperSet, names: tuple[str, ...]) -> None:
    remedy = f"Prepare {paper.name} again, or exclude it by without in its {SET_FILE}"
    what = f"{paper.name} has a label outside of its {paper.classes} classes of Table B1"
    if all(_is_number(name) for name in names):
        for name in names:
            if not 0 <= int(name) <= paper.classes:  # Some sets count from 1.
                raise UserError(what, name, remedy)
    if len(names) > paper.classes:
        what = f"{paper.name} has more than its {paper.classes} classes of Table B1"
        raise UserError(what, len(names), remedy)


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _remedy(entry: SuiteSet, present: str | None) -> str:
    if entry.paper is None:
        return f"Prepare it beside {present}" if present else "Prepare train and test there"
    missing = [split for split in SPLITS if split != present]
    return f"Run {' and '.join(entry.paper.commands(str(entry.folder.parent), missing))}"


def missing_lines(catalogue: Catalogue, root: str) -> list[str]:
    """For each missing set where it comes from and the commands that prepare it, one text a set."""
    return [
        f"{paper.title} is missing: get it from {paper.source}; then run {' and '.join(paper.commands(root))}"
        for paper in catalogue.missing
    ]


def as_json(catalogue: Catalogue, root: str) -> list[dict[str, Any]]:
    """The missing sets as JSON."""
    return [
        {"name": paper.name, "title": paper.title, "source": paper.source, "commands": paper.commands(root)}
        for paper in catalogue.missing
    ]
