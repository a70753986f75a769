import collections
import math

import numpy as np
import pytest

from aimv2_jax.config import build_config, config_to_dict
from aimv2_jax.data.datasets import write_dataset
from aimv2_jax.data.records import Record
from aimv2_jax.eval import entropy as module
from aimv2_jax.eval.entropy import entropy, token_frequencies
from aimv2_jax.eval.load import load


def test_entropy_when_shares_are_known_then_that_of_the_formula():
    assert entropy(np.array([2.0, 0, 1, 1])) == pytest.approx(1.5 * math.log(2))
    assert entropy(np.array([0.0, 7.0])) == 0
    assert entropy(np.zeros(3)) is None


def test_token_frequencies_when_counted_by_hand_then_weighted_by_the_mixture_with_ends(workdir, config, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)  # 20 captions: two chunks and a rest.
    tokenizer = load(str(workdir)).tokenizer()
    frequencies = token_frequencies(config, tokenizer)
    assert sorted(frequencies) == ["alt", "synthetic"]
    for kind, weight in (("alt", 1), ("synthetic", 2)):
        names = [("red", "green", "blue")[number % 3] for number in range(20)]
        texts = {
            "alt": [f"{name} disc {number}" for number, name in enumerate(names)],
            "synthetic": [f"a picture of a {name} disc on white" for name in names],
        }[kind]
        counts = collections.Counter()
        for text in texts:
            [tokens], [token_valid] = tokenizer.encode([text.encode()])
            counts.update(tokens[token_valid].tolist() + ([tokenizer.eos_id] if not token_valid.all() else []))
        expected = np.zeros(config.model.decoder.vocab_size)
        for token, count in counts.items():
            expected[token] = weight * count / 20
        np.testing.assert_allclose(frequencies[kind], expected)


def test_token_frequencies_when_a_source_has_unusable_records_then_they_are_left_out(workdir, config, tmp_path):
    tokenizer = load(str(workdir)).tokenizer()
    good = [Record(f"{i}", b"not looked at", {"alt": "a disc", "synthetic": "a disc"}) for i in range(3)]
    write_dataset(tmp_path / "good", good)
    bad = [Record("none", b"", {}), Record("empty", b"", {"alt": " ", "synthetic": " "})]
    write_dataset(tmp_path / "bad", [*good, *bad])
    with_source = [config_of(config, tmp_path / name) for name in ("good", "bad")]
    good, bad = (token_frequencies(each, tokenizer) for each in with_source)
    np.testing.assert_array_equal(good["alt"], bad["alt"])


def test_token_frequencies_count_one_caption_of_a_record_each_in_turn(workdir, config, tmp_path):
    """Otherwise records with many captions would count for more than training shows them."""
    tokenizer = load(str(workdir)).tokenizer()
    texts = [["a disc", "red"], ["a red disc"], ["disc", "a blue disc"], ["x"], ["y", "z"]]
    for name, turns in (("all", texts), ("one", [found[i % len(found)] for i, found in enumerate(texts)])):
        records = [Record(f"{i}", b"", {"alt": found, "synthetic": "a"}) for i, found in enumerate(turns)]
        write_dataset(tmp_path / name, records)
    found, wanted = (token_frequencies(config_of(config, tmp_path / name), tokenizer) for name in ("all", "one"))
    np.testing.assert_array_equal(found["alt"], wanted["alt"])


def config_of(config, folder):
    """`config` with its training data in another folder."""
    tree = config_to_dict(config)
    tree["data"]["sources"] = {"train": str(folder)}
    return build_config(tree)
