"""Data mixtures: sources, caption types and weights for `data.sources` and `data.mixture`."""

from typing import NamedTuple

from ml_collections import ConfigDict


class Pool(NamedTuple):
    """Image-text pairs of one caption type of a source: their number and sampling probability."""

    pairs: int
    probability: float


# The pre-training mixture of the paper [P: Table 2]; the probabilities add up to 1. Each DFN image has two synthetic
# captions: prepare such a dataset with a list of texts for the type `synthetic`. HQITP is not public.
PAPER = {
    "dfn": {"alt": Pool(1_901_228_573, 0.30), "synthetic": Pool(3_802_457_146, 0.30)},
    "coyo": {"alt": Pool(560_171_533, 0.09)},
    "hqitp": {"alt": Pool(564_623_839, 0.28), "synthetic": Pool(431_506_953, 0.03)},
}


def use_paper_mixture(config: ConfigDict) -> None:
    """Sets the paper's sources and weights; the paths are the expected folders of prepared records. [O]"""
    config.data.sources = {name: f"data/{name}/train" for name in PAPER}
    config.data.mixture = _weights(["alt", "synthetic"])
    config.tokenizer.path = "data/tokenizer.model"
    config.eval.sources = {"dfn": "data/dfn/heldout"}
    config.eval.max_examples = 8192  # [O: eight batches of 1024 for each caption type]


def use_alt_text_only(config: ConfigDict) -> None:
    """Removes the synthetic captions from the paper's mixture, for later stages [P]; weights keep their proportions."""
    config.data.mixture = _weights(["alt"])


def _weights(caption_types: list[str]) -> dict[str, dict[str, float]]:
    return {
        name: {kind: pool.probability for kind, pool in pools.items() if kind in caption_types}
        for name, pools in PAPER.items()
    }
