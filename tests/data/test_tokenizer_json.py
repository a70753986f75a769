"""Tokenizer files of Hugging Face: rows for decoders and text towers, special ids, and files that cannot be used."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import UserError
from tests.helpers.tokenizer_files import word_tokenizer

UNKNOWN, START, END, PAD = 0, 1, 2, 3
A, B, C = 4, 5, 6
BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}


def special(name, index):
    """An entry of a file's added tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": name, "special": True, **flags}


def test_rows_of_a_decoder(write_json):
    """Pieces without the start token, the end id after a complete text, padding; only pieces are valid."""
    tokenizer = Tokenizer(write_json(), length=4, vocab_size=11)
    arrays = tokenizer.batch_arrays([b"a b c", b"b", b"", b"a a a a a", b"a zzz"])
    assert arrays["tokens"].tolist() == [
        [A, B, C, END],
        [B, END, PAD, PAD],
        [END, PAD, PAD, PAD],
        [A, A, A, A],
        [A, UNKNOWN, END, PAD],
    ]
    assert arrays["token_valid"].sum(1).tolist() == [3, 1, 0, 4, 2]
    assert arrays["truncated"].tolist() == [False, False, False, True, False]
    assert arrays["tokens"].dtype == np.int32 and tokenizer.batch_arrays([])["tokens"].shape == (0, 4)


def test_rows_of_a_text_tower(write_json):
    """Start, pieces and end, as the library's own post-processor; long texts are cut before the end."""
    path = write_json()
    tokenizer = Tokenizer(path, length=5, vocab_size=11, always_end=True)
    texts = ["a b c", "b", "", "a b c a b c"]
    arrays = tokenizer.batch_arrays([text.encode() for text in texts])
    library = Library.from_file(path)
    library.enable_padding(pad_id=PAD, length=5)
    assert arrays["tokens"].tolist()[:3] == [library.encode(text).ids for text in texts[:3]]
    assert arrays["tokens"].tolist()[3] == [START, A, B, C, END]
    assert arrays["token_valid"].tolist()[1] == [True, True, False, False, False]
    assert arrays["token_valid"].sum(1).tolist() == [4, 2, 1, 4]  # All before the end.
    assert arrays["truncated"].tolist() == [False, False, False, True]


@pytest.mark.parametrize("always_end", [False, True])
def test_caption_cannot_spell_special_tokens(write_json, always_end):
    """Special tokens in a text are left out, whether added tokens or words, but for the unknown one."""
    tokenizer = Tokenizer(write_json(), length=8, vocab_size=11, always_end=always_end)
    plain = tokenizer.encode([b"a b <unk>"])
    for text in (b"a</s>b <s> <unk>", b"</s> a b <pad><unk>"):
        for one, other in zip(tokenizer.encode([text]), plain):
            np.testing.assert_array_equal(one, other)
    # A file that declares no special tokens, whose post-processor names them.
    undeclared = Tokenizer(write_json(added_tokens=[]), length=8, vocab_size=11, always_end=always_end)
    np.testing.assert_array_equal(undeclared.encode([b"a </s> b <s> <unk>"])[0], plain[0])


def test_special_ids_of_a_json_file(write_json):
    """Ids, number of pieces and digest come from the file, whatever its name; its cutting and padding are not used."""
    padding = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None}
    padding |= {"pad_id": 7, "pad_type_id": 0, "pad_token": "red"}
    truncation = {"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    path = write_json("some.model", padding=padding, truncation=truncation)
    tokenizer = Tokenizer(path, length=4, vocab_size=11)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.num_pieces) == (END, 7, UNKNOWN, 11)
    assert tokenizer.encode([b"a b"])[0].tolist() == [[A, B, END, 7]]
    assert tokenizer.digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert tokenizer.file_name == "tokenizer.json"


@pytest.mark.parametrize(
    ("post_processor", "start", "end"),
    [
        (processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)]), (), END),  # T5
        (processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]), (START,), END),  # Llama 2
        (processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), (START,), END),
        (processors.BertProcessing(("c", 6), ("b", 5)), (B,), C),
        (processors.ByteLevel(), (), END),  # GPT-2
        (None, (), END),
    ],
)
def test_end_id_by_post_processor_or_name(tmp_path, post_processor, start, end):
    """The end is what the post-processor puts after a text; where it puts nothing, the token with a usual name."""
    library = Library.from_str(json.dumps(word_tokenizer() | {"post_processor": None}))
    if post_processor is not None:
        library.post_processor = post_processor
    path = str(tmp_path / "tokenizer.json")
    library.save(path)
    tokenizer = Tokenizer(path, length=5, vocab_size=11, always_end=True)
    assert tokenizer.eos_id == end
    assert tokenizer.encode([b"a a"])[0].tolist() == [[*start, A, A, end, PAD, PAD][:5]]


def test_json_file_without_end_or_padding(write_json):
    """It serves decoders whose end is no target; text towers and others refuse it."""
    path = write_json(added_tokens=[], post_processor=None, model=BPE)
    tokenizer = Tokenizer(path, length=3, vocab_size=2, needs_end=False)
    assert (tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (None, None, 0)
    assert tokenizer.encode([b"bb", b"bbb"])[0].tolist() == [[1, 1, 0], [1, 1, 0]]
    for arguments, message in (((), "loss.predict_eos needs"), ((False, True), "a text tower needs")):
        with pytest.raises(UserError, match=f"no end id, which {message}.*tokenizer.json"):
            Tokenizer(path, 3, 2, *arguments)


def test_num_pieces_is_the_largest_id_plus_one(write_json):
    """Added tokens, gaps and ids that only the post-processor has need rows of the table, too."""
    added = word_tokenizer()["added_tokens"]
    assert Tokenizer(write_json(added_tokens=[*added, special("<x>", 11)]), 8, 12).num_pieces == 12
    gap = write_json(added_tokens=[], post_processor=None, model=BPE | {"vocab": {"a": 4, "b": 20}})
    assert Tokenizer(gap, 8, 21, needs_end=False).num_pieces == 21
    template = json.dumps(word_tokenizer()["post_processor"]).replace("[2]", "[70]")
    far = write_json(post_processor=json.loads(template))
    with pytest.raises(UserError, match=r"has 71 pieces, more than model\.decoder\.vocab_size: 70"):
        Tokenizer(far, 8, 70)


def test_decode_of_a_json_file(write_json):
    """Decoding returns the text before the first end or padding id, without the start token."""
    tokenizer = Tokenizer(write_json(), length=8, vocab_size=11, always_end=True)
    tokens, _ = tokenizer.encode([b"red disc", b""])
    assert [tokenizer.decode(row) for row in tokens] == ["red disc", ""]


def test_bytes_of_any_caption_have_pieces(tmp_path):
    """A byte-level file encodes any letter, also of bytes that are not UTF-8."""
    library = Library(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    library.normalizer = normalizers.Replace(Regex("x"), "y")
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens([AddedToken("</s>", special=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.json"), length=12, vocab_size=257)
    _, valid = tokenizer.encode(["x☃🌵".encode(), b"\xff"])
    assert valid.sum(1).tolist() == [8, 3]  # The replacement character has 3 bytes.


# Words of the error message -> changes of a file that has it.
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "q", "type_id": 0}}], "pair": []}
SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": True}
UNUSABLE = {
    "did not match any variant of untagged enum ModelUntagged": {"model": None},
    "ModelUntagged": {"model": {}},
    "Missing [UNK] token": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "absent"}},
    "no entry found for key": {"post_processor": TEMPLATE | {"special_tokens": {}}},
    "Cannot parse precompiled_charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "unmatched parenthesis": {"pre_tokenizer": SPLIT},
    "no pieces for the letter a": {"model": BPE | {"vocab": {}}},
    "dropout makes tokens random": {"model": BPE | {"dropout": 0.1}},
    "nested too deep": {"version": json.loads("[" * 70 + "]" * 70)},
}


@pytest.mark.parametrize("words", UNUSABLE)
def test_unusable_json_is_a_user_error(words, write_json, capfd):
    """One sentence with the reason, and nothing of the library on stderr, not even where its code panics."""
    with pytest.raises(UserError) as error:
        Tokenizer(write_json(**UNUSABLE[words]), 8, 100)
    message = str(error.value)
    assert message.startswith("config tokenizer.path: not a usable tokenizer.json, ") and words in message
    assert len(message) < 700 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", ["{", "{}", '{"a": NaN}', '{"model": 1}', " {\n\xff}"])
def test_json_of_another_format_is_a_user_error(content, tmp_path):
    """Broken JSON and JSON of another format have the message of a tokenizer.json."""
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"not a usable tokenizer\.json, .*Give a SentencePiece"):
        Tokenizer(str(path), 8, 100)


def test_large_json_is_refused_unparsed(tmp_path, monkeypatch):
    """A file above the limit of JSON is refused by its size."""
    monkeypatch.setattr("aimv2_jax.data.tokenizer_json.MAX_JSON_BYTES", 1000)
    path = tmp_path / "tokenizer.json"
    path.write_text("{" + " " * 1000)
    with pytest.raises(UserError, match="it has 1,001 bytes, the limit is 1,000"):
        Tokenizer(str(path), 8, 100)


def test_json_text_tower_without_room(write_json):
    """T must hold the special tokens and one piece."""
    path = write_json()
    with pytest.raises(UserError, match="text_length has no room for a text beside the tokenizer's 2 special"):
        Tokenizer(path, 2, 11, always_end=True, section="lit.text")
    assert Tokenizer(path, 3, 11, always_end=True).encode([b"a b"])[0].tolist() == [[START, A, END]]


def test_json_text_tower_with_the_end_as_start(tmp_path):
    """A text tower's embedding is at the first end id, so a file that starts texts with it is refused."""
    library = Library.from_str(json.dumps(word_tokenizer() | {"post_processor": None}))
    library.post_processor = processors.RobertaProcessing(("</s>", END), ("</s>", END))
    path = str(tmp_path / "tokenizer.json")
    library.save(path)
    assert Tokenizer(path, length=5, vocab_size=11).encode([b"a"])[0].tolist() == [[A, END, PAD, PAD, PAD]]
    with pytest.raises(UserError, match=r"puts its end token before a text too.*Choose a tokenizer"):
        Tokenizer(path, length=5, vocab_size=11, always_end=True)
