import collections
import math

import numpy as np
import pytest

from aimv2_jax.config.load import build_config, config_to_dict
from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.records import Record
from aimv2_jax.eval import token_entropy as module
from aimv2_jax.eval.token_entropy import entropy, token_frequencies
from aimv2_jax.pretrained.model import load


def test_entropy_of_known_frequencies():
    """Entropy is that of the formula, 0 for one token, and None without tokens."""
    assert entropy(np.array([2.0, 0, 1, 1])) == pytest.approx(1.5 * math.log(2))
    assert entropy(np.array([0.0, 7.0])) == 0
    assert entropy(np.zeros(3)) is None


def test_token_frequencies_equal_a_count_by_hand(workdir, config, monkeypatch):
    """Frequencies are weighted by the mixture and include the end tokens."""
    monkeypatch.setattr(module, "_CHUNK", 7)  # 20 captions make two full chunks and a partial one.
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


def test_token_frequencies_leave_out_unusable_records(workdir, config, tmp_path):
    """Records without a usable caption change no frequency."""
    tokenizer = load(str(workdir)).tokenizer()
    good = [Record(f"{i}", b"not looked at", {"alt": "a disc", "synthetic": "a disc"}) for i in range(3)]
    write_dataset(tmp_path / "good", good)
    bad = [Record("none", b"", {}), Record("empty", b"", {"alt": " ", "synthetic": " "})]
    write_dataset(tmp_path / "bad", [*good, *bad])
    with_source = [config_of(config, tmp_path / name) for name in ("good", "bad")]
    good, bad = (token_frequencies(changed, tokenizer) for changed in with_source)
    np.testing.assert_array_equal(good["alt"], bad["alt"])


def test_token_frequencies_take_captions_in_turn(workdir, config, tmp_path):
    """Records with many captions have the same weight as in training."""
    tokenizer = load(str(workdir)).tokenizer()
    texts = [["a disc", "red"], ["a red disc"], ["disc", "a blue disc"], ["x"], ["y", "z"]]
    rotated = [captions[i % len(captions)] for i, captions in enumerate(texts)]
    for name, alt in (("all", texts), ("one", rotated)):
        records = [Record(f"{i}", b"", {"alt": captions, "synthetic": "a"}) for i, captions in enumerate(alt)]
        write_dataset(tmp_path / name, records)
    actual, expected = (token_frequencies(config_of(config, tmp_path / name), tokenizer) for name in ("all", "one"))
    np.testing.assert_array_equal(actual["alt"], expected["alt"])


def config_of(config, folder):
    """`config` with its training data in another folder."""
    tree = config_to_dict(config)
    tree["data"]["sources"] = {"train": str(folder)}
    return build_config(tree)
