"""Tokenizer contract, on models with and without the special pieces."""

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
    def trained(**ids):
        model = io.BytesIO()
        words = [f"{a}{b} {b}{c}" for a in "abcdefgh" for b in "ijklmn" for c in "opqrst"]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2, **ids
        )
        path = tmp_path_factory.mktemp("models") / "some.model"
        path.write_bytes(model.getvalue())
        return str(path)

    return trained


def test_encode_when_compared_with_sentencepiece_then_the_same_pieces_cut_ended_and_padded(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=resolve_path(SAMPLE).read_bytes())
    tokens, token_valid = tokenizer.encode(TEXTS)
    assert (tokens.shape, tokens.dtype, token_valid.dtype) == ((4, 12), np.int32, bool)
    for text, row, valid in zip(TEXTS, tokens, token_valid):
        wanted = pieces.encode(text.decode())
        padded = wanted + [pieces.eos_id()] + [pieces.pad_id()] * 11
        assert row.tolist() == padded[:12]
        assert valid.tolist() == [column < len(wanted) for column in range(12)]


def test_end_follows_whole_captions_only_where_it_is_a_target(train):
    """If the end is not a target, it follows at most T - 1 pieces, as in the reference's tokenizer."""
    path, letters = train(pad_id=3), [b"a " * count for count in (6, 7, 8, 9)]
    counts = [
        len(ids) for ids in sentencepiece.SentencePieceProcessor(model_file=path).encode([x.decode() for x in letters])
    ]
    length = counts[2]
    learned, ignored = (Tokenizer(path, length, vocab_size=60, needs_end=needs) for needs in (True, False))
    arrays = learned.batch_arrays(letters)
    assert (arrays["tokens"] == learned.eos_id).sum(1).tolist() == [1, 1, 0, 0]
    assert arrays["token_valid"].sum(1).tolist() == [counts[0], counts[1], length, length]
    assert arrays["truncated"].tolist() == [False, False, False, True]
    arrays = ignored.batch_arrays(letters)
    assert (arrays["tokens"] == learned.eos_id).sum(1).tolist() == [1, 1, 1, 1]
    assert arrays["token_valid"].sum(1).tolist() == [counts[0], counts[1], length - 1, length - 1]
    assert arrays["truncated"].tolist() == [False, False, True, True]


def test_model_file_of_6_gb_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.model"
    path.touch()
    os.truncate(path, 6 * 10**9)
    with pytest.raises(UserError, match=r"not a SentencePiece model, it has 6,000,000,000 bytes.*large.model"):
        Tokenizer(str(path), 12, 768)


def test_encode_when_in_another_batch_then_the_same_row(tokenizer):
    together = tokenizer.encode(TEXTS)
    for i, text in enumerate(TEXTS):
        for all_rows, alone in zip(together, tokenizer.encode([text])):
            np.testing.assert_array_equal(all_rows[i], alone[0])


def test_encode_when_no_captions_then_no_rows(tokenizer):
    tokens, token_valid = tokenizer.encode([])
    assert tokens.shape == token_valid.shape == (0, 12)
    assert tokenizer.batch_arrays([])["truncated"].shape == (0,)


def test_decode_when_encoded_then_the_text_up_to_its_end(tokenizer):
    tokens, _ = tokenizer.encode(TEXTS)
    assert tokenizer.decode(tokens[0]) == "a wide photograph of a canyon."
    assert tokenizer.decode(tokens[1]) == ""
    assert tokenizer.decode(2 * tokens[0].tolist()) == "a wide photograph of a canyon."


def test_sample_tokenizer_when_any_letter_then_never_unknown(tokenizer):
    tokens, token_valid = tokenizer.encode(["日本 ☃ ß".encode(), b"\xf0\x9f\x8c\xb5"])
    assert tokenizer.unk_id not in tokens[token_valid]
    assert tokenizer.decode(tokens[1]) == "🌵"


def test_special_ids_when_the_file_chooses_them_then_read_from_it(train):
    tokenizer = Tokenizer(train(pad_id=5, eos_id=3, unk_id=0, bos_id=4), length=6, vocab_size=60)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.num_pieces) == (5, 3, 0, 60)
    tokens, _ = tokenizer.encode([b""])
    assert tokens.tolist() == [[3, 5, 5, 5, 5, 5]]


def test_padding_when_the_file_has_none_then_the_end_id_and_else_zero(train):
    tokenizer = Tokenizer(train(pad_id=-1, eos_id=2), length=4, vocab_size=60)
    assert tokenizer.encode([b""])[0].tolist() == [[2, 2, 2, 2]]
    endless = Tokenizer(train(pad_id=-1, eos_id=-1), length=4, vocab_size=60, needs_end=False)
    tokens, token_valid = endless.encode([b"ai ij"])
    assert token_valid.sum() <= 3 and (tokens[~token_valid] == 0).all()


@pytest.mark.parametrize(
    ("ids", "special"),
    [
        ({"unk_id": 0, "eos_id": 1, "bos_id": -1, "pad_id": -1}, (1, 1, 0)),  # SigLIP pads with the end id.
        ({"unk_id": 2, "eos_id": 1, "bos_id": -1, "pad_id": 0}, (0, 1, 2)),  # T5 and this project.
        ({"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}, (3, 2, 0)),  # With a begin id, which is not used.
    ],
)
def test_special_ids_when_as_others_place_them_then_text_end_and_padding_are_right(train, ids, special):
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


def test_vocabulary_when_equal_to_the_pieces_or_larger_then_taken_with_the_same_tokens(train):
    path = train()
    exact, larger = (Tokenizer(path, length=8, vocab_size=size) for size in (60, 1000))
    assert exact.num_pieces == larger.num_pieces == 60
    for one, other in zip(exact.encode(TEXTS), larger.encode(TEXTS)):
        np.testing.assert_array_equal(one, other)


def test_user_errors_when_the_file_cannot_serve_then_one_sentence_each(train, tmp_path):
    no_end, junk = train(eos_id=-1), tmp_path / "junk.model"
    junk.write_bytes(b"not a model")
    (tmp_path / "empty.model").write_bytes(b"")
    cases = [
        ((str(tmp_path / "absent.model"), 12, 768), "no such file"),
        (("", 12, 768), "no such file"),
        ((str(tmp_path), 12, 768), "no such file"),
        ((str(junk), 12, 768), "not a SentencePiece model"),
        ((str(tmp_path / "empty.model"), 12, 768), "not a SentencePiece model"),
        ((SAMPLE, 12, 767), "has 768 pieces, more than model.decoder.vocab_size: 767"),
        ((no_end, 12, 768), "no end id"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError) as error:
            Tokenizer(*arguments)
        assert message in str(error.value)


def test_user_error_when_the_file_is_missing_then_raised_before_tensorflow_is_imported():
    program = (
        "import sys; from aimv2_jax.data.tokenizer import Tokenizer; from aimv2_jax.errors import UserError\n"
        "try: Tokenizer('absent.model', 12, 768)\n"
        "except UserError: print('tensorflow' in sys.modules, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_tensorflow_when_loaded_then_silent_on_the_terminal():
    program = f"from aimv2_jax.data.tokenizer import Tokenizer; Tokenizer({SAMPLE!r}, 12, 768).encode([b'x'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
