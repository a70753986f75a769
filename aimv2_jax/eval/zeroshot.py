"""Zero-shot classification: predicts the class whose caption is most likely given the image.

    python -m aimv2_jax.eval.zeroshot --checkpoint SPEC --data data/test --label coarse --template "a photo of a {}."

SPEC is a run with its decoder (WORKDIR, WORKDIR:STEP, WORKDIR:last), or an export with --whole; --data is a dataset
that aimv2_jax.prepare wrote with --label NAME=FIELD. With several --template a class has the mean of their
log-likelihoods. Results are also reported less the prior, which is the caption's log-likelihood given an image of the
mean colour; --confusion draws those. --json writes top1, ci95 and per_class, the same below less_prior, and label,
templates, examples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.cli import Parser
from aimv2_jax.errors import EXIT_FINISHED, cli_main
from aimv2_jax.eval.cli import add_checkpoint, add_labels, check_files, write_json
from aimv2_jax.eval.likelihood import Scorer
from aimv2_jax.eval.probes.dataset import LabelledDataset, read_labelled_dataset
from aimv2_jax.eval.probes.report import classification_metrics, confusion_figure
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.images import ImageLike
from aimv2_jax.pretrained.model import load

_TEMPLATE = "a photo of a {}."


def class_scores(
    scorer: Scorer, test: LabelledDataset, templates: Sequence[str]
) -> tuple[Float[np.ndarray, "M C"], Float[np.ndarray, " C"]]:
    """Log-likelihood of every class, mean over templates: for every image, and for an image of the mean colour."""
    captions = [template.replace("{}", name) for name in test.names for template in templates]
    tokens, loss_mask = scorer.encode(captions)

    def scores(images: Sequence[ImageLike]) -> Float[np.ndarray, "B C"]:
        return scorer(images, tokens, loss_mask).reshape(len(images), len(test.names), -1).mean(-1)

    parts = []
    size = scorer.encoder.batch_size
    for start in tqdm(range(0, len(test), size), unit="batch"):
        parts.append(scores([test.image(index) for index in range(start, min(start + size, len(test)))]))
    side = scorer.encoder.spec.image_size
    mean = np.rint(255 * np.array(scorer.encoder.spec.pixel_mean)).astype(np.uint8)
    return np.concatenate(parts), scores([np.broadcast_to(mean, (side, side, 3)).copy()])[0]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses and checks the command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.zeroshot", description=summary, epilog=epilog)
    add_checkpoint(parser)
    add = parser.add_argument
    add("--data", required=True, metavar="DATA", help="a prepared dataset with labels")
    add_labels(parser)
    add(
        "--template",
        action="append",
        metavar="TEXT",
        help=f'caption with {{}} for the class (default "{_TEMPLATE}"); may be repeated',
    )
    flags = parser.parse_args(arguments)
    flags.template = flags.template or [_TEMPLATE]
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
    scorer = Scorer(load(flags.checkpoint, flags.weights))
    scores, prior = class_scores(scorer, test, flags.template)
    predicted = {"": scores.argmax(1), "less_prior": (scores - prior).argmax(1)}
    by_score = {name: classification_metrics(test, classes) for name, classes in predicted.items()}
    for name, metrics in by_score.items():
        low, high = metrics["ci95"]
        title = "less the prior" if name else "likelihood"
        print(f"zero-shot {flags.label}, {title}: top-1 {metrics['top1']:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    print(f"{len(test)} images, {len(test.names)} classes; chance {1 / len(test.names):.3f}")
    if flags.json is not None:
        result = by_score[""] | {
            "less_prior": by_score["less_prior"],
            "label": flags.label,
            "templates": flags.template,
            "examples": len(test),
        }
        write_json(flags.json, result)
    if flags.confusion is not None:
        heading = f"Zero-shot {flags.label}: top-1 {by_score['less_prior']['top1']:.3f}"
        note = f"{len(test)} images. Rows are true classes, columns the most likely captions less the prior."
        confusion_figure(test, predicted["less_prior"], heading, note).savefig(flags.confusion, dpi=110)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
