"""Class names and prompt templates of zero-shot classification, from text files with one entry a line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from aimv2_jax.data.class_counts import class_order
from aimv2_jax.errors import UserError
from aimv2_jax.eval.probes.dataset import LabelledDataset
from aimv2_jax.storage.paths import resolve_path
from aimv2_jax.untrusted import read_file

_FOLDER = "package:eval/imagenet_prompts"
TEMPLATE_SETS = {"imagenet": f"{_FOLDER}/templates.txt", "simple": f"{_FOLDER}/simple_templates.txt"}
"""OpenAI's prompt templates for ImageNet, and seven of them."""
CLASS_SETS = {"imagenet": f"{_FOLDER}/classes.txt"}
"""OpenAI's class names of ImageNet, in the order of the WordNet ids; two of them stand for two classes each."""
_MAX_BYTES = 16 << 20


def class_prompts(names: Iterable[Sequence[str]], templates: Sequence[str]) -> list[list[str]]:
    """The prompts of every class: each of its names in each template."""
    return [[template.replace("{}", name) for name in own for template in templates] for own in names]


def read_templates(source: str) -> list[str]:
    """Reads the templates of a file, or of one of `TEMPLATE_SETS`.

    Raises:
      UserError: for an unreadable file, or a line without {} for the class.
    """
    templates = _lines("--templates", source, TEMPLATE_SETS)
    for number, template in enumerate(templates, start=1):
        if "{}" not in template:
            remedy = 'Write each as "a photo of a {}."'
            raise UserError(f"--templates {source}: line {number} has no {{}} for the class", template, remedy)
    return templates


def read_class_names(source: str, labels: Sequence[str], listed: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Reads the names of every class: {label: names}, in the order of the classes.

    A line has the names of a class, separated by commas; or its label, a tab, and its names. Lines without labels
    belong to the `listed` classes, or to the labels in their order (numbers by value), unless all labels are among the
    lines: then each line is a label itself. Classes that the dataset lacks are candidates too.

    Args:
      source: a file, or one of `CLASS_SETS`.
      labels: the dataset's labels; with `listed`, in its order.
      listed: all classes of the dataset in the order of their numbers, if it lists them.

    Raises:
      UserError: for an unreadable file; for an empty or repeated name or label; for a label without a line, or lines
        that cannot be matched with labels.
    """
    flag = f"--classes {source}"
    lines = _lines("--classes", source, CLASS_SETS)
    if any("\t" in line for line in lines):
        rows = [_split_label(flag, number, line) for number, line in enumerate(lines, start=1)]
    else:
        rows = list(zip(_labels_of_lines(flag, lines, labels, listed), lines))
    _check_unique(f"{flag}: two lines have the same label", [label for label, _ in rows])
    names = {label: _split_names(flag, number, text) for number, (label, text) in enumerate(rows, start=1)}
    if source not in CLASS_SETS:
        own_names = [name.casefold() for own in names.values() for name in own]
        _check_unique(f"{flag}: two classes have the same name", own_names)
    unnamed = [label for label in labels if label not in names]
    if unnamed:
        raise UserError(
            f"{flag} has no line for a label of the dataset", unnamed[0], "Add it, or exclude it: --without"
        )
    return names


def names_of_classes(source: str, test: LabelledDataset, without: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The names of every class of a dataset from a class file, without those in `without`.

    Raises:
      UserError: as `read_class_names`.
    """
    listed = test.source.info.classes.get(test.label) or class_order({*test.names, *without})
    names = read_class_names(source, test.names, tuple(listed))
    return {label: own for label, own in names.items() if label not in without}


def _lines(flag: str, source: str, sets: Mapping[str, str]) -> list[str]:
    path = sets.get(source, source)
    file = resolve_path(path)
    try:
        text = read_file(file, _MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: the file is not text in UTF-8", path, "Save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{flag}: the file cannot be read, {error}", path, "Give a text file") from error
    except OSError as error:
        why = error.strerror or type(error).__name__
        remedy = f"Give a text file, or {', '.join(sets)}"
        raise UserError(f"{flag}: the file cannot be read ({why})", path, remedy) from error
    lines = text.rstrip("\n\r").split("\n")
    if lines == [""]:
        raise UserError(f"{flag}: the file is empty", path, "Write one entry a line")
    return [line.strip(" \r") for line in lines]


def _split_label(flag: str, number: int, line: str) -> tuple[str, str]:
    label, tab, text = line.partition("\t")
    if not tab or "\t" in text:
        raise UserError(f"{flag}: line {number} does not have one tab", line, "Write every line as LABEL<TAB>NAMES")
    return label.strip(), text


def _split_names(flag: str, number: int, text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UserError(f"{flag}: line {number} has an empty name", text, "Write one or more names, between commas")
    return names


def _labels_of_lines(flag: str, lines: Sequence[str], labels: Sequence[str], listed: Sequence[str]) -> list[str]:
    if set(labels) <= set(lines):
        return list(lines)
    in_order = labels if listed else class_order(labels)
    ordered = list(listed if len(lines) == len(listed) else in_order)
    if len(lines) != len(ordered):
        counts = f"{len(lines)} lines, {len(labels)} labels"
        remedy = "Give one line a label, or write every line as LABEL<TAB>NAMES"
        raise UserError(f"{flag} does not fit the dataset's labels", counts, remedy)
    for number, (line, label) in enumerate(zip(lines, ordered), start=1):
        if line != label and line in ordered:
            what = f"{flag}: line {number} is in the place of the label {label}, but is another label"
            raise UserError(what, line, "Write every line as LABEL<TAB>NAMES")
    return ordered


def _check_unique(what: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(what, name, "Give each class its own")
        seen.add(name)
