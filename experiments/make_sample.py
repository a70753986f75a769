"""Makes the quickstart's dataset, which is part of the package, from a folder of webdataset tars.

    python experiments/make_sample.py --input DIR --output aimv2_jax/data/sample

`INPUT/{train,test}/*.tar` become `OUTPUT/{train,test}/{photo,other}` (photographs, and everything else), with the
caption types alt and synthetic and the labels label, coarse and kind. A SentencePiece model is trained on the train
captions. The output is deterministic.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from aimv2_jax.cli import Parser
from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.records import Record
from aimv2_jax.data.transforms import captions
from aimv2_jax.errors import UserError, cli_main
from aimv2_jax.prepare.inputs.discover import find_shards
from aimv2_jax.prepare.inputs.reader import read
from aimv2_jax.prepare.inputs.samples import BadInput
from aimv2_jax.prepare.tokenizer import train_model

KINDS = ("alt", "synthetic")
LABELS = ("label", "coarse", "kind")
# 256 bytes, 3 special, 509 learnt; further pieces would occur at most twice in these captions. BPE, because on so small
# a text unigram pruning splits words as common as "drawing" into three pieces.
VOCAB_SIZE = 768

README = """# The quickstart's images

{images} pairs of an image and two captions, all with free licences: authors and licence of each in `ATTRIBUTION.md`,
the texts in `licenses/`. Made by `experiments/make_sample.py`; the format is that of `aimv2_jax/data/records.py`.

{table}
Caption kinds: `alt` (the maker's text) and `synthetic` (a sentence by template, standing in for a captioning model).
Labels: `label`, `coarse`, `kind`. A record's key is its source and image key in `ATTRIBUTION.md`.

`tokenizer.model`: SentencePiece (BPE), {vocab_size} pieces with bytes as the last resort, trained on the train
captions after `aimv2_jax.data.transforms.captions.clean`; pad 0, end 1, unknown 2.
"""


def read_tar(path: Path) -> Iterator[Record]:
    """Yields the pairs of a webdataset tar in order of key; raises `UserError` if a part of it cannot be read."""
    [shard] = find_shards([str(path)])
    samples = []
    for item in read(shard):
        if isinstance(item, BadInput):
            remedy = "Give the folder of the sample, or copy the file again"
            raise UserError("--input has a tar that cannot be read", str(path), remedy)
        samples.append(item)
    for sample in sorted(samples, key=lambda sample: sample.key):
        fields = {field: sample.fields.get(f"json:{field}") for field in (*KINDS, *LABELS, "source", "picture_key")}
        absent = [field for field, value in fields.items() if value is None]
        if absent or sample.image is None:
            what = f"--input has a pair without {', '.join(absent) or 'its image'}"
            raise UserError(what, f"{path}: {sample.key}", "Give the folder of the sample")
        yield Record(
            key=f"{fields['source']}/{fields['picture_key']}",
            image=sample.image,
            captions={kind: fields[kind] for kind in KINDS},
            labels={name: fields[name] for name in LABELS},
        )


def _pairs(source: Path, split: str) -> list[Record]:
    return [record for path in sorted(source.glob(f"{split}/*.tar")) for record in read_tar(path)]


def make(source: Path, target: Path) -> None:
    """Writes the dataset of `source` to `target`, which it replaces."""
    if not list(source.glob("train/*.tar")):
        raise UserError("--input has no train/*.tar", str(source), "Give the folder of the sample")
    if target.exists() and any(target.iterdir()) and not (target / "train/photo/dataset.json").is_file():
        raise UserError("--output exists and is not such a dataset", str(target), "Give another folder, or remove it")
    splits = {split: _pairs(source, split) for split in ("train", "test")}
    shutil.rmtree(target, ignore_errors=True)
    texts: list[str] = []
    total = 0
    table = "| data set | pairs |\n|---|---|\n"
    for split, pairs in splits.items():
        photos = [record for record in pairs if record.labels["kind"] == "photo"]
        others = [record for record in pairs if record.labels["kind"] != "photo"]
        for name, records in (("photo", photos), ("other", others)):
            write_dataset(target / split / name, records)
            table += f"| {split}/{name} | {len(records)} |\n"
        total += len(pairs)
        if split == "train":
            texts = [captions.clean(record.captions[kind]) for record in pairs for kind in KINDS]
    (target / "tokenizer.model").write_bytes(train_model(texts, VOCAB_SIZE))
    shutil.copy(source / "ATTRIBUTION.md", target)
    shutil.copytree(source / "licenses", target / "licenses")
    readme = README.format(images=total, table=table, vocab_size=VOCAB_SIZE)
    (target / "README.md").write_text(readme, encoding="utf-8")


@cli_main
def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder with train/*.tar and test/*.tar")
    parser.add_argument("--output", type=Path, required=True, help="folder that is replaced")
    args = parser.parse_args()
    make(args.input, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
