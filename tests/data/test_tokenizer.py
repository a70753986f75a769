"""Tokenizer: ids, validity and padding of captions, with SentencePiece models that have or lack special pieces."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import UserError
from aimv2_jax.storage.paths import resolve_path

SAMPLE = "package:data/sample/tokenizer.model"
TEXTS = [b"a wide photograph of a canyon.", b"", b"caf\xc3\xa9 \xe6\x97\xa5\xe6\x9c\xac", b"table " * 30]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains a small SentencePiece model with the given special ids; returns its path."""

    def train_model(**ids):
        model = io.BytesIO()
        words = [f"{a}{b} {b}{c}" for a in "abcdefgh" for b in "ijklmn" for c in "opqrst"]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2, **ids
        )
        path = tmp_path_factory.mktemp("models") / "some.model"
        path.write_bytes(model.getvalue())
        return str(path)

    return train_model


def test_encode_matches_sentencepiece(tokenizer):
    """A row holds SentencePiece's ids, the end id and padding, cut to T; only the pieces are valid."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=resolve_path(SAMPLE).read_bytes())
    tokens, token_valid = tokenizer.encode(TEXTS)
    assert (tokens.shape, tokens.dtype, token_valid.dtype) == ((4, 12), np.int32, bool)
    for text, row, valid in zip(TEXTS, tokens, token_valid):
        wanted = pieces.encode(text.decode())
        padded = wanted + [pieces.eos_id()] + [pieces.pad_id()] * 11
        assert row.tolist() == padded[:12]
        assert valid.tolist() == [column < len(wanted) for column in range(12)]


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_end_id_of_captions_of_about_length_t(kind, train, write_json):
    """If the end id is a target, only captions shorter than T have one, and longer ones than T are cut to T.

    Otherwise captions are cut to T - 1 pieces, and the end id always follows, as in the reference's tokenizer.
    """
    texts, counts = [b"a " * count for count in (6, 7, 8, 9)], [6, 7, 8, 9]
    if kind == "json":
        path = write_json()
    else:
        path = train(pad_id=3)
        pieces = sentencepiece.SentencePieceProcessor(model_file=path)
        counts = [len(ids) for ids in pieces.encode([text.decode() for text in texts])]
    length = counts[2]
    with_target, without_target = (Tokenizer(path, length, vocab_size=60, needs_end=needs) for needs in (True, False))
    arrays = with_target.batch_arrays(texts)
    assert (arrays["tokens"] == with_target.eos_id).sum(1).tolist() == [1, 1, 0, 0]
    assert arrays["token_valid"].sum(1).tolist() == [counts[0], counts[1], length, length]
    assert arrays["truncated"].tolist() == [False, False, False, True]
    arrays = without_target.batch_arrays(texts)
    assert (arrays["tokens"] == without_target.eos_id).sum(1).tolist() == [1, 1, 1, 1]
    assert arrays["token_valid"].sum(1).tolist() == [counts[0], counts[1], length - 1, length - 1]
    assert arrays["truncated"].tolist() == [False, False, True, True]


def test_rows_of_a_text_tower_by_sentencepiece(train):
    """With `always_end`, captions are cut to T - 1 pieces, and the end id follows each."""
    path = train(pad_id=3)
    pieces = sentencepiece.SentencePieceProcessor(model_file=path)
    tokenizer = Tokenizer(path, length=6, vocab_size=60, always_end=True)
    arrays = tokenizer.batch_arrays([b"ai", b"ai ij " * 9, b""])
    short, long = pieces.encode("ai"), pieces.encode("ai ij " * 9)[:5]
    rows = [[*ids, tokenizer.eos_id] + [3] * (5 - len(ids)) for ids in (short, long, [])]
    assert arrays["tokens"].tolist() == rows
    assert arrays["token_valid"].sum(1).tolist() == [len(short), 5, 0]
    assert arrays["truncated"].tolist() == [False, True, False]


def test_large_model_file_is_refused_unread(tmp_path):
    """A file of 6 GB is refused by its size, before it is read."""
    path = tmp_path / "large.model"
    path.touch()
    os.truncate(path, 6 * 10**9)
    with pytest.raises(UserError, match=r"not a tokenizer, it has 6,000,000,000 bytes.*large.model"):
        Tokenizer(str(path), 12, 768)


def test_sentencepiece_with_the_name_of_json(tmp_path):
    """The content decides that a file is a SentencePiece model."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(resolve_path(SAMPLE).read_bytes())
    assert Tokenizer(str(path), 12, 768).file_name == "tokenizer.model"


def test_encode_row_does_not_depend_on_the_batch(tokenizer):
    """A caption has the same row in a batch and alone."""
    together = tokenizer.encode(TEXTS)
    for i, text in enumerate(TEXTS):
        for all_rows, alone in zip(together, tokenizer.encode([text])):
            np.testing.assert_array_equal(all_rows[i], alone[0])


def test_encode_of_no_captions_has_no_rows(tokenizer):
    """All arrays are empty, with the usual number of columns."""
    tokens, token_valid = tokenizer.encode([])
    assert tokens.shape == token_valid.shape == (0, 12)
    assert tokenizer.batch_arrays([])["truncated"].shape == (0,)


def test_decode_stops_at_the_first_end_id(tokenizer):
    """Decoding returns the text before the first end or padding id."""
    tokens, _ = tokenizer.encode(TEXTS)
    assert tokenizer.decode(tokens[0]) == "a wide photograph of a canyon."
    assert tokenizer.decode(tokens[1]) == ""
    assert tokenizer.decode(2 * tokens[0].tolist()) == "a wide photograph of a canyon."


def test_sample_tokenizer_knows_every_letter(tokenizer):
    """Letters of any script and emoji are encoded without the unknown id."""
    tokens, token_valid = tokenizer.encode(["日本 ☃ ß".encode(), b"\xf0\x9f\x8c\xb5"])
    assert tokenizer.unk_id not in tokens[token_valid]
    assert tokenizer.decode(tokens[1]) == "🌵"


def test_special_ids_come_from_the_file(train):
    """The padding, end and unknown ids are those of the model file, in any order."""
    tokenizer = Tokenizer(train(pad_id=5, eos_id=3, unk_id=0, bos_id=4), length=6, vocab_size=60)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.num_pieces) == (5, 3, 0, 60)
    tokens, _ = tokenizer.encode([b""])
    assert tokens.tolist() == [[3, 5, 5, 5, 5, 5]]


def test_padding_of_a_file_without_a_padding_id(train):
    """The end id pads; without an end id, 0 pads."""
    tokenizer = Tokenizer(train(pad_id=-1, eos_id=2), length=4, vocab_size=60)
    assert tokenizer.encode([b""])[0].tolist() == [[2, 2, 2, 2]]
    without_end = Tokenizer(train(pad_id=-1, eos_id=-1), length=4, vocab_size=60, needs_end=False)
    tokens, token_valid = without_end.encode([b"ai ij"])
    assert token_valid.sum() <= 3 and (tokens[~token_valid] == 0).all()


@pytest.mark.parametrize(
    ("ids", "special"),
    [
        ({"unk_id": 0, "eos_id": 1, "bos_id": -1, "pad_id": -1}, (1, 1, 0)),  # SigLIP pads with the end id.
        ({"unk_id": 2, "eos_id": 1, "bos_id": -1, "pad_id": 0}, (0, 1, 2)),  # T5 and this project.
        ({"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}, (3, 2, 0)),  # With a begin id, which is not used.
    ],
)
def test_special_ids_of_other_projects(train, ids, special):
    """Text, end and padding are right with the special ids of SigLIP, T5 and files with a begin id."""
    path = train(**ids)
    pieces = sentencepiece.SentencePieceProcessor(model_file=path).encode("ai ij")
    tokenizer = Tokenizer(path, length=8, vocab_size=60)
    pad, end, unknown = special
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == special
    tokens, token_valid = tokenizer.encode([b"ai ij", b"", "☃".encode()])
    assert tokens[0].tolist() == [*pieces, end] + [pad] * (7 - len(pieces))
    assert tokens[1].tolist() == [end] + [pad] * 7
    assert unknown in tokens[2][token_valid[2]]
    assert token_valid[:2].sum(axis=1).tolist() == [len(pieces), 0]
    assert tokenizer.decode(tokens[0]) == "ai ij"


def test_vocab_size_may_exceed_the_pieces(train):
    """A `vocab_size` equal to the number of pieces or larger gives the same tokens."""
    path = train()
    exact, larger = (Tokenizer(path, length=8, vocab_size=size) for size in (60, 1000))
    assert exact.num_pieces == larger.num_pieces == 60
    for one, other in zip(exact.encode(TEXTS), larger.encode(TEXTS)):
        np.testing.assert_array_equal(one, other)


def test_unusable_file_is_a_user_error(train, tmp_path):
    """Each kind of unusable file has a message of its own."""
    no_end, junk = train(eos_id=-1), tmp_path / "junk.model"
    junk.write_bytes(b"not a model")
    (tmp_path / "empty.model").write_bytes(b"")
    cases = [
        ((str(tmp_path / "absent.model"), 12, 768), "no such file"),
        (("", 12, 768), "no such file"),
        ((str(tmp_path), 12, 768), "no such file"),
        ((str(junk), 12, 768), "neither a SentencePiece model nor a tokenizer.json"),
        ((str(tmp_path / "empty.model"), 12, 768), "neither a SentencePiece model nor a tokenizer.json"),
        ((SAMPLE, 12, 767), "has 768 pieces, more than model.decoder.vocab_size: 767"),
        ((no_end, 12, 768), "no end id, which loss.predict_eos needs"),
        ((no_end, 12, 768, False, True), "no end id, which a text tower needs"),
        ((SAMPLE, 12, 767, True, True, "lit.text"), "has 768 pieces, more than lit.text.vocab_size: 767"),
        ((SAMPLE, 1, 768, True, True, "lit.text"), "lit.text.text_length has no room for a text beside"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError) as error:
            Tokenizer(*arguments)
        assert message in str(error.value)


def test_missing_file_is_reported_before_imports():
    """The user error is raised before tensorflow or jax is imported."""
    program = (
        "import sys; from aimv2_jax.data.tokenizer import Tokenizer; from aimv2_jax.errors import UserError\n"
        "try: Tokenizer('absent.model', 12, 768)\n"
        "except UserError: print('tensorflow' in sys.modules, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_tensorflow_loads_silently():
    """Loading tensorflow and encoding print nothing on stdout and stderr."""
    program = f"from aimv2_jax.data.tokenizer import Tokenizer; Tokenizer({SAMPLE!r}, 12, 768).encode([b'x'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
