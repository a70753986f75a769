"""Classes told without training a probe: whose caption does the decoder find likeliest, given the picture?

    python -m aimv2_jax.eval.zeroshot --checkpoint SPEC --data data/test --label coarse --template "a photo of a {}."

SPEC is a run with its decoder (WORKDIR, WORKDIR:STEP, WORKDIR:last), or an export with --whole; --data a set that
aimv2_jax.data.prepare made with --label NAME=FIELD. With several --template a class has the mean of their likelihoods.
What a caption's words are worth by themselves can be taken away: beside the plain figure stands the one less the
likelihood given a picture of the mean colour. --json writes top1, ci95 and per_class, the same below less_prior, and
label, templates, examples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.errors import EXIT_FINISHED, reports_user_errors
from aimv2_jax.eval.arguments import add_checkpoint
from aimv2_jax.eval.images import ImageLike
from aimv2_jax.eval.likelihood import Scorer
from aimv2_jax.eval.load import load
from aimv2_jax.eval.probes.examples import Examples, read_examples
from aimv2_jax.eval.probes.report import confusion_figure, figures
from aimv2_jax.flags import Parser, check_output
from aimv2_jax.platforms import skip_absent_tpu

_TEMPLATE = "a photo of a {}."


def class_scores(
    scorer: Scorer, test: Examples, templates: Sequence[str]
) -> tuple[Float[np.ndarray, "M C"], Float[np.ndarray, " C"]]:
    """The log-likelihood of every class for every picture, mean over templates; and for one of the mean colour."""
    captions = [template.replace("{}", name) for name in test.names for template in templates]
    tokens, counted = scorer.encode(captions)

    def scores(images: Sequence[ImageLike]) -> Float[np.ndarray, "B C"]:
        return scorer(images, tokens, counted).reshape(len(images), len(test.names), -1).mean(-1)

    parts = []
    size = scorer.eyes.batch_size
    for start in tqdm(range(0, len(test), size), unit="batch"):
        parts.append(scores([test.image(place) for place in range(start, min(start + size, len(test)))]))
    side = scorer.eyes.vision.image_size
    mean = np.rint(255 * np.array(scorer.eyes.vision.pixel_mean)).astype(np.uint8)
    return np.concatenate(parts), scores([np.broadcast_to(mean, (side, side, 3)).copy()])[0]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked flags of a command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.zeroshot", description=summary, epilog=epilog)
    add_checkpoint(parser)
    add = parser.add_argument
    add("--data", required=True, metavar="DATA", help="a prepared set with labels")
    add("--label", required=True, metavar="NAME", help="the label to be told")
    add(
        "--template",
        action="append",
        metavar="TEXT",
        help=f'with {{}} for the class (default "{_TEMPLATE}"); several may be given',
    )
    add("--by", metavar="NAME", help="another label, by whose values results are told apart")
    add("--without", default="", metavar="A,B", help="values of --label that are left out")
    add("--json", type=Path, metavar="FILE", help="the figures")
    add("--confusion", type=Path, metavar="FILE.png", help="the confusion matrix, less the prior")
    flags = parser.parse_args(arguments)
    flags.template = flags.template or [_TEMPLATE]
    for template in flags.template:
        if "{}" not in template:
            parser.error(f"--template {template!r} has no {{}} for the class")
    return flags


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    for path, flag, suffix in ((flags.json, "--json", ""), (flags.confusion, "--confusion", ".png")):
        if path is not None:
            check_output(path, suffix, flag)
    without = tuple(filter(None, flags.without.split(",")))
    test = read_examples(flags.data, "--data", flags.label, flags.by, without)
    scorer = Scorer(load(flags.checkpoint, flags.weights))
    scores, prior = class_scores(scorer, test, flags.template)
    predicted = {"": scores.argmax(1), "less_prior": (scores - prior).argmax(1)}
    found = {name: figures(test, choice) for name, choice in predicted.items()}
    for name, one in found.items():
        low, high = one["ci95"]
        title = "less the prior" if name else "likelihood"
        print(f"zero-shot {flags.label}, {title}: top-1 {one['top1']:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    print(f"{len(test)} pictures, {len(test.names)} classes; chance {1 / len(test.names):.3f}")
    if flags.json is not None:
        result = found[""] | {
            "less_prior": found["less_prior"],
            "label": flags.label,
            "templates": flags.template,
            "examples": len(test),
        }
        flags.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if flags.confusion is not None:
        heading = f"Zero-shot {flags.label}: top-1 {found['less_prior']['top1']:.3f}"
        note = f"{len(test)} pictures. A row a true class, a column the likeliest caption, less its prior."
        confusion_figure(test, predicted["less_prior"], heading, note).savefig(flags.confusion, dpi=110)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
