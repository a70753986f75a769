"""Class names and templates of zero-shot classification, from files."""

from __future__ import annotations

import hashlib

import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.eval.prompts import class_prompts, read_class_names, read_templates
from aimv2_jax.storage.paths import resolve_path

# SHA-256 of the lists of open-clip-torch 3.3.0, joined by line ends.
PUBLISHED = {
    "classes.txt": "8800e39242cbed4c6889376e20a49cfdaf4f84a773a6686d15c3b39972ef94c4",
    "templates.txt": "717aaf1055595d318aa456669c0de6675d883ccebfa70ca12ff890b7aab710cb",
    "simple_templates.txt": "521a62d0a05a423b35c722307363a2ded56bd69f48179cfeeeefb5128f98b362",
}


@pytest.fixture
def write(tmp_path):
    """A function that writes a file and returns its name."""

    def write_file(content: str | bytes) -> str:
        path = tmp_path / "file.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


@pytest.mark.parametrize("name", PUBLISHED)
def test_bundled_lists_are_as_published(name):
    """The bundled lists are those of open-clip-torch, byte by byte."""
    content = resolve_path(f"package:eval/imagenet_prompts/{name}").read_bytes()
    assert hashlib.sha256(content).hexdigest() == PUBLISHED[name]


def test_bundled_lists_by_name():
    """`imagenet` and `simple` name OpenAI's templates; the seven are among the eighty."""
    templates, simple = read_templates("imagenet"), read_templates("simple")
    assert len(templates) == 80 and templates[0] == "a bad photo of a {}." and templates[-1] == "a tattoo of the {}."
    assert len(simple) == 7 and set(simple) < set(templates)


def test_imagenet_classes_fit_wordnet_ids():
    """The names of ImageNet belong to the sorted WordNet ids, two names to two classes each."""
    ids = [f"n{number:08}" for number in range(1000)]
    names = read_class_names("imagenet", ids[::-1])
    assert list(names) == ids and names[ids[0]] == ("tench",) and names[ids[-1]] == ("toilet paper",)
    assert len(set(names.values())) == 998


def test_every_name_is_put_into_every_template():
    """The prompts of a class are all its names in all templates, in order."""
    prompts = class_prompts([("cat",), ("dog", "hound")], ["a {}.", "{} and {}"])
    assert prompts == [["a cat.", "cat and cat"], ["a dog.", "dog and dog", "a hound.", "hound and hound"]]


@pytest.mark.parametrize(
    ("content", "labels", "expected"),
    [
        ("tabby cat\nhound\n", ["b", "a"], {"a": ("tabby cat",), "b": ("hound",)}),
        ("zero\r\none\r\ntwo\r\n", ["10", "9", "2"], {"2": ("zero",), "9": ("one",), "10": ("two",)}),
        ("b\thound, dog\na\tcat\n", ["a", "b"], {"b": ("hound", "dog"), "a": ("cat",)}),
        ("b\thound\nc\tcow\na\tcat", ["a", "b"], {"b": ("hound",), "c": ("cow",), "a": ("cat",)}),
        ("dog\ncow\ncat", ["cat", "dog"], {"dog": ("dog",), "cow": ("cow",), "cat": ("cat",)}),
        ("\ufeffcat\ndog", ["a", "b"], {"a": ("cat",), "b": ("dog",)}),
    ],
    ids=["in the order of labels", "numbers by value", "by label", "more classes", "labels themselves", "with a BOM"],
)
def test_class_names_and_their_order(write, content, labels, expected):
    """Classes are in the order of the file, and names belong to the labels as documented."""
    names = read_class_names(write(content), labels)
    assert names == expected and list(names) == list(expected)


@pytest.mark.parametrize("content", ["dog\nbird\ncat\n", "dog\ncat", "c\tcat\nb\tbird\na\tdog"])
def test_class_names_without_a_label(write, content):
    """A label that no image has, such as one that is left out, may have a line of the class file."""
    names = read_class_names(write(content), ["a", "c"], listed=["a", "b", "c"])
    assert names.pop("b", ("bird",)) == ("bird",)
    assert names == {"a": ("dog",), "c": ("cat",)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\nCat\n", "two classes have the same name: 'cat'"),
        ("a\tcat\na\tdog\n", "two lines have the same label: 'a'"),
        ("a\tcat, dog\nb\tdog\n", "two classes have the same name: 'dog'"),
        ("cat\n\n dog", "3 lines, 2 labels"),
        ("cat\n,dog\n", "line 2 has an empty name"),
        ("\ncat\n", "line 1 has an empty name"),
        ("a\t\nb\tdog\n", "line 1 has an empty name"),
        ("a\tcat\nb dog\n", "line 2 does not have one tab"),
        ("a\tcat\nc\tdog\n", "no line for a label of the dataset: 'b'"),
        ("b\ncat\n", "line 1 is in the place of the label a, but is another label: 'b'"),
        ("cat\n", "does not fit the dataset's labels: '1 lines, 2 labels'"),
        ("", "the file is empty"),
        (b"\xff\xfe", "not text in UTF-8"),
    ],
)
def test_unusable_class_file(write, content, message):
    """A class file with repeated, empty or unmatched names raises UserError that names them."""
    with pytest.raises(UserError, match=message):
        read_class_names(write(content), ["a", "b"])


def test_missing_file(tmp_path):
    """A missing file, or a name that is no bundled list, raises UserError."""
    message = (
        r"--classes: the file cannot be read \(No such file or directory\): 'imgnet'\. Give a text file, or imagenet"
    )
    with pytest.raises(UserError, match=message):
        read_class_names("imgnet", ["a", "b"])
    with pytest.raises(UserError, match="--templates: the file cannot be read"):
        read_templates(str(tmp_path))


def test_template_file_without_class(write):
    """A template without {} raises UserError with its line."""
    with pytest.raises(UserError, match=r"line 2 has no \{\} for the class: 'a cat'"):
        read_templates(write("a {}\na cat\n"))
