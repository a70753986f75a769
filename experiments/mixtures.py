"""Data mixtures: sources, caption kinds and weights, in the structure of `data.sources` and `data.mixture`."""

from ml_collections import ConfigDict

# The pre-training mixture of the paper [P: Table 2]. Weights are shares of the examples; they add up to 1.
#   source   pictures          alt-text   synthetic
#   dfn      1,901,228,573     0.30       0.30  (3,802,457,146 synthetic captions)
#   coyo       560,171,533     0.09       -
#   hqitp      564,623,839     0.28       0.03  (431,506,953 synthetic captions; the set is not public)
PAPER = {
    "dfn": {"alt": 0.30, "synthetic": 0.30},
    "coyo": {"alt": 0.09},
    "hqitp": {"alt": 0.28, "synthetic": 0.03},
}


def use_paper_mixture(config: ConfigDict) -> None:
    """Sets the paper's sources and weights; the paths are where prepared records are expected. [O]"""
    config.data.sources = {name: f"data/{name}/train" for name in PAPER}
    config.data.mixture = PAPER
    config.tokenizer.path = "data/tokenizer.model"
    config.eval.sources = {"dfn": "data/dfn/heldout"}
    config.eval.max_examples = 8192  # [O: eight batches of 1024 a caption kind]


def use_alt_text_only(config: ConfigDict) -> None:
    """Takes the synthetic captions out of the paper's mixture, for later stages [P]; weights keep their proportions."""
    config.data.mixture = {name: {"alt": kinds["alt"]} for name, kinds in PAPER.items()}
