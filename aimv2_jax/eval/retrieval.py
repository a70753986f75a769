"""Image-to-text and text-to-image retrieval, by embeddings in one space or by the decoder's likelihood.

    python -m aimv2_jax.eval.retrieval --checkpoint SPEC --data data/test --kind alt --image retrieval.png

SPEC is a model with a text tower: a LiT run (WORKDIR, WORKDIR:STEP, WORKDIR:last), its export, a Hugging Face
Aimv2Model folder, or Apple's file. Images and captions are retrieved by the cosine of their embeddings.
Or SPEC is a run with its decoder, or an export with --whole. Then every caption is scored for every image, so the cost
grows with the square of --examples. An image is retrieved by the caption's likelihood, a caption by its likelihood
standardised over the images, so that short or common captions and those of high variance do not win everywhere.

--data is a prepared dataset.
--json writes text_to_image and image_to_text, each {recall@1, recall@5, recall@10, chance@1}, and examples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.cli import Parser, positive
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.eval.cli import add_checkpoint, check_files, write_json
from aimv2_jax.eval.image_text import load_image_text_model
from aimv2_jax.eval.likelihood import Scorer
from aimv2_jax.eval.plots import image_cards
from aimv2_jax.eval.probes.dataset import named_image, read_record
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.dual_encoder import PretrainedDualEncoder
from aimv2_jax.pretrained.images import NamedImage
from aimv2_jax.untrusted import printable

_RECALL_DEPTHS = (1, 5, 10)
_DRAWN_IMAGES = 8  # Images drawn by --image.
_DRAWN_CAPTIONS = 3  # Retrieved captions drawn for each.


def read_pairs(path: str, kind: str, count: int) -> tuple[list[NamedImage], list[str]]:
    """Images and captions of `count` evenly spaced records, without repeated captions; a record's first caption counts.

    Raises:
      UserError: for a dataset with fewer than two different captions of this kind.
    """
    source = Source(path, path, "--data")
    if kind not in source.kinds:
        available = printable(", ".join(source.kinds))
        raise UserError(f"--data {path} has no captions of this kind", kind, f"It has {available}")
    image_of: dict[str, NamedImage] = {}
    step = max(1, len(source) // count)
    order = [index for first in range(step) for index in range(first, len(source), step)]
    for index in order:
        _, record = read_record(source, index, "--data")
        for caption in record.texts(kind)[:1]:
            image_of.setdefault(caption, named_image(source, record))
        if len(image_of) == count:
            break
    if len(image_of) < 2:
        what = f"--data {path} has fewer than two different captions of this kind"
        raise UserError(what, kind, "Give a larger dataset")
    return list(image_of.values()), list(image_of)


def caption_scores(
    model: PretrainedDualEncoder | Scorer, images: Sequence[NamedImage], captions: Sequence[str]
) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, "N N"]]:
    """Scores of every caption for every image: those that retrieve images, and those that retrieve captions."""
    if isinstance(model, PretrainedDualEncoder):
        cosines = model.image_embeddings(images) @ model.text_embeddings(captions).T
        return cosines, cosines
    likelihoods = model(images, *model.encode(captions))
    return likelihoods, (likelihoods - likelihoods.mean(0)) / np.maximum(likelihoods.std(0), 1e-6)


def ranks(scores: Float[np.ndarray, "N N"]) -> Int[np.ndarray, " N"]:
    """Rank of the correct column, the diagonal, in each row: the number of others that score at least as high."""
    return (scores >= np.diag(scores)[:, None]).sum(1) - 1


def recalls(scores: Float[np.ndarray, "N N"]) -> dict[str, float]:
    """`recall@k` of rows that retrieve their own column, and the chance level for k = 1."""
    rank = ranks(scores)
    recall = {f"recall@{depth}": float((rank < depth).mean()) for depth in _RECALL_DEPTHS}
    return recall | {"chance@1": 1 / len(scores)}


def retrieval_figure(
    images: Sequence[np.ndarray], captions: Sequence[str], scores: Float[np.ndarray, "N N"], heading: str, note: str
) -> Figure:
    """Images beside the captions retrieved for them, best first, and their own caption."""
    texts = []
    for row in range(min(_DRAWN_IMAGES, len(images))):
        best = np.argsort(-scores[row], kind="stable")[:_DRAWN_CAPTIONS]
        retrieved = {f"retrieved, {rank + 1}": captions[column] for rank, column in enumerate(best)}
        texts.append(retrieved | {f"its own, rank {ranks(scores)[row] + 1} of {len(captions)}": captions[row]})
    return image_cards(images[: len(texts)], texts, heading, note)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses and checks the command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.retrieval", description=summary, epilog=epilog)
    add_checkpoint(parser, "the model, see below")
    add = parser.add_argument
    add("--data", required=True, metavar="DATA", help="a prepared dataset")
    add("--kind", default="alt", metavar="KIND", help="caption kind (default %(default)s)")
    examples_help = "number of images and captions (default %(default)s)"
    add("--examples", type=_at_least_two, default=128, metavar="N", help=examples_help)
    add("--json", type=Path, metavar="FILE", help="write the metrics to this file")
    add("--image", type=Path, metavar="FILE.png", help="draw some images with their retrieved captions")
    return parser.parse_args(arguments)


def _at_least_two(text: str) -> int:
    if positive(text) < 2:
        raise argparse.ArgumentTypeError("retrieval among one example is trivial: give at least 2")
    return int(text)


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    check_files(json=flags.json, image=flags.image)
    images, captions = read_pairs(flags.data, flags.kind, flags.examples)
    model = load_image_text_model(flags.checkpoint, flags.weights)
    to_images, to_captions = caption_scores(model, images, captions)
    metrics = {"text_to_image": recalls(to_images.T), "image_to_text": recalls(to_captions)}
    for name, recall in metrics.items():
        print(f"{name.replace('_', ' ')}: " + ", ".join(f"{key} {value:.3f}" for key, value in recall.items()))
    if flags.json is not None:
        write_json(flags.json, metrics | {"examples": len(captions)})
    if flags.image is not None:
        by, detail = "likelihood", " standardised over the images"
        if isinstance(model, PretrainedDualEncoder):
            by, detail = "cosine", " of the embeddings"
        pixels = [model.encoder.pixels(image) for image in images[:_DRAWN_IMAGES]]
        note = f"Of {len(captions)} captions ({flags.kind}), by {by}{detail}."
        heading = f"Captions retrieved by {by}"
        retrieval_figure(pixels, captions, to_captions, heading, note).savefig(flags.image, dpi=110)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
