"""Zero-shot classification: predicts the class whose texts fit the image best.

    python -m aimv2_jax.eval.zeroshot --checkpoint SPEC --data data/test --label coarse --template "a photo of a {}."
    python -m aimv2_jax.eval.zeroshot --checkpoint SPEC --data data/val --label wnid --classes imagenet \\
        --templates imagenet

SPEC is a model with a text tower: a LiT run (WORKDIR, WORKDIR:STEP, WORKDIR:last), its export, a Hugging Face
Aimv2Model folder, or Apple's file. A class is the mean of its texts' embeddings, and the prediction the class of the
greatest cosine. Or SPEC is a run with its decoder, or an export with --whole: then a class has the mean of its texts'
log-likelihoods. Results are also reported less the prior, which is the log-likelihood given an image of the mean
colour; --confusion draws those.

--data is a dataset that aimv2_jax.prepare wrote with --label NAME=FIELD. A class's name is its label, unless --classes
FILE has others: one line a class, in the order of the classes in dataset.json, or LABEL<TAB>NAME. Commas separate
several names of a class. "imagenet" has OpenAI's names of the 1,000 classes in the order of their WordNet ids. Every
name is put into every template. --templates FILE has one a line; "imagenet" is OpenAI's 80, "simple" seven of them.

--json writes top1, ci95, top5, top5_ci95, per_class, label, templates, examples; with --classes the names of each
class; for a decoder top1, ci95, top5, top5_ci95, per_class below less_prior, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.cli import Parser
from aimv2_jax.errors import EXIT_FINISHED, cli_main
from aimv2_jax.eval.cli import add_checkpoint, add_labels, check_files, write_json
from aimv2_jax.eval.image_text import load_image_text_model
from aimv2_jax.eval.likelihood import Scorer
from aimv2_jax.eval.probes.dataset import LabelledDataset, read_labelled_dataset
from aimv2_jax.eval.probes.report import confusion_figure, score_metrics
from aimv2_jax.eval.prompts import CLASS_SETS, TEMPLATE_SETS, class_prompts, names_of_classes, read_templates
from aimv2_jax.models.dual_encoder import normalise_rows
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.dual_encoder import PretrainedDualEncoder
from aimv2_jax.pretrained.images import ImageLike, NamedImage

_TEMPLATE = "a photo of a {}."
# Names of scores, and what they choose as the class of an image.
_COSINE, _LIKELIHOOD, _LESS_PRIOR = "cosine", "likelihood", "less the prior"
_CHOICES = {_COSINE: "the classes of the nearest texts", _LESS_PRIOR: "the most likely captions less the prior"}

Prompts = Sequence[Sequence[str]]
"""The texts of every class."""


def text_classifier(model: PretrainedDualEncoder, prompts: Prompts) -> Float[np.ndarray, "C E"]:
    """The embedding of every class: the mean of its texts' embeddings, which have length 1, scaled to length 1."""
    embeddings = model.text_embeddings(_flat(prompts))
    return np.asarray(normalise_rows(jnp.asarray(_class_means(embeddings.T, prompts).T)))


def class_similarities(
    model: PretrainedDualEncoder, test: LabelledDataset, prompts: Prompts
) -> Float[np.ndarray, "M C"]:
    """Cosine of the embeddings of every image and every class."""
    classifier = text_classifier(model, prompts)
    size = model.encoder.batch_size
    return np.concatenate([model.image_embeddings(images) @ classifier.T for images in _batches(test, size)])


def class_likelihoods(
    scorer: Scorer, test: LabelledDataset, prompts: Prompts
) -> tuple[Float[np.ndarray, "M C"], Float[np.ndarray, " C"]]:
    """Mean log-likelihood of the texts of every class: for every image, and for an image of the mean colour."""
    tokens, loss_mask = scorer.encode(_flat(prompts))

    def scores(images: Sequence[ImageLike]) -> Float[np.ndarray, "B C"]:
        return _class_means(scorer(images, tokens, loss_mask), prompts)

    parts = [scores(images) for images in _batches(test, scorer.encoder.batch_size)]
    side = scorer.encoder.spec.image_size
    mean = np.rint(255 * np.array(scorer.encoder.spec.pixel_mean)).astype(np.uint8)
    return np.concatenate(parts), scores([np.broadcast_to(mean, (side, side, 3)).copy()])[0]


def scores_by_name(
    model: PretrainedDualEncoder | Scorer, test: LabelledDataset, prompts: Prompts
) -> dict[str, Float[np.ndarray, "M C"]]:
    """The model's scores of every class for every image; the last ones are drawn."""
    if isinstance(model, PretrainedDualEncoder):
        return {_COSINE: class_similarities(model, test, prompts)}
    likelihoods, prior = class_likelihoods(model, test, prompts)
    return {_LIKELIHOOD: likelihoods, _LESS_PRIOR: likelihoods - prior}


def _flat(prompts: Prompts) -> list[str]:
    return [text for texts in prompts for text in texts]


def _class_means(values: Float[np.ndarray, "N texts"], prompts: Prompts) -> Float[np.ndarray, "N C"]:
    """Means over the texts of every class."""
    ends = np.cumsum([len(texts) for texts in prompts])
    return np.stack([part.mean(axis=1) for part in np.split(values, ends[:-1], axis=1)], axis=1)


def _batches(test: LabelledDataset, size: int) -> Iterator[list[NamedImage]]:
    for start in tqdm(range(0, len(test), size), unit="batch"):
        yield [test.image(index) for index in range(start, min(start + size, len(test)))]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses and checks the command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.zeroshot", description=summary, epilog=epilog)
    add_checkpoint(parser, "the model, see below")
    add = parser.add_argument
    add("--data", required=True, metavar="DATA", help="a prepared dataset with labels")
    add_labels(parser)
    add(
        "--template",
        action="append",
        default=[],
        metavar="TEXT",
        help=f'caption with {{}} for the class (default "{_TEMPLATE}"); may be repeated',
    )
    sets = ", ".join(TEMPLATE_SETS)
    add("--templates", metavar="FILE", help=f"more templates, one a line; or {sets}")
    add("--classes", metavar="FILE", help=f"names of the classes, one class a line; or {', '.join(CLASS_SETS)}")
    flags = parser.parse_args(arguments)
    for template in flags.template:
        if "{}" not in template:
            parser.error(f"--template {template!r} has no {{}} for the class")
    return flags


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    check_files(json=flags.json, confusion=flags.confusion)
    test = read_labelled_dataset(flags.data, "--data", flags.label, flags.by, flags.without)
    names = {label: (label,) for label in test.names}
    if flags.classes is not None:
        names = names_of_classes(flags.classes, test, flags.without)
        test = test.with_classes(list(names))
    templates = [*flags.template, *(read_templates(flags.templates) if flags.templates else ())] or [_TEMPLATE]
    prompts = class_prompts(names.values(), templates)
    scores = scores_by_name(load_image_text_model(flags.checkpoint, flags.weights), test, prompts)
    metrics = {name: score_metrics(test, values) for name, values in scores.items()}
    for name, values in metrics.items():
        print(f"zero-shot {flags.label}, {name}: {_accuracies(values, len(names))}")
    print(f"{len(test)} images, {len(names)} classes; chance {1 / len(names):.3f}")
    drawn = list(scores)[-1]
    if flags.json is not None:
        less_prior = {"less_prior": metrics[_LESS_PRIOR]} if _LESS_PRIOR in metrics else {}
        classes = {"classes": names} if flags.classes is not None else {}
        about = {"label": flags.label, "templates": templates, "examples": len(test)}
        write_json(flags.json, metrics[next(iter(scores))] | less_prior | about | classes)
    if flags.confusion is not None:
        heading = f"Zero-shot {flags.label}: top-1 {metrics[drawn]['top1']:.3f}"
        note = f"{len(test)} images. Rows are true classes, columns {_CHOICES[drawn]}."
        named = dataclasses.replace(test, names=tuple(own[0] for own in names.values()))
        confusion_figure(named, scores[drawn].argmax(1), heading, note).savefig(flags.confusion, dpi=110)
    return EXIT_FINISHED


def _accuracies(metrics: Mapping[str, Any], num_classes: int) -> str:
    low, high = metrics["ci95"]
    text = f"top-1 {metrics['top1']:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    if num_classes <= 5:
        return text
    low, high = metrics["top5_ci95"]
    return f"{text}; top-5 {metrics['top5']:.3f}, {low:.3f} to {high:.3f}"


if __name__ == "__main__":
    sys.exit(main())
