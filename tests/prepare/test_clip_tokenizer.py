"""CLIP's tokenizer: ids by an independent BPE, the command that writes the file, and vocabularies that it refuses."""

import gzip
import io
import itertools
import unicodedata
import zipfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.data.tokenizer_json import TokenizerJson
from aimv2_jax.prepare.clip_tokenizer import NUM_MERGES, clip_tokenizer
from aimv2_jax.prepare.tokenizer import main

# Byte-level BPE has a printable letter for each byte: its own character, or the next one from 256.
PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
LETTERS = {byte: chr(byte) if byte in PRINTABLE else chr(256 + i - len(PRINTABLE)) for i, byte in enumerate(BYTES)}
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# A symbol is a string of bytes and whether it ends a word.
SYMBOLS = [(bytes([byte]), False) for byte in BYTES] + [(bytes([byte]), True) for byte in BYTES]
SOME = [symbol for symbol in SYMBOLS if symbol[0] in "ast1'.é😀".encode()]


def written(symbol):
    """A symbol as in CLIP's vocabulary."""
    content, ends = symbol
    return "".join(LETTERS[byte] for byte in content) + ("</w>" if ends else "")


def words_of(text):
    """Words of a text in lower case: contractions, runs of letters, single digits, runs of anything else but space."""
    text = " ".join(unicodedata.normalize("NFC", text).split()).lower()
    kinds = [" " if c.isspace() else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "x") for c in text]
    words, at = [], 0
    while at < len(text):
        end = at + 1
        contraction = next((c for c in CONTRACTIONS if text[at : at + len(c)].casefold() == c), None)
        if contraction:
            end = at + len(contraction)
        elif kinds[at] != "N":
            while end < len(text) and kinds[end] == kinds[at]:
                end += 1
        if kinds[at] != " ":
            words.append(text[at:end])
        at = end
    return words


def encode(text, merges):
    """Ids by the definition of BPE: in each word, the pair that was merged first is merged wherever it is, again."""
    ids = {symbol: i for i, symbol in enumerate([*SYMBOLS, *((a + b, ends) for (a, _), (b, ends) in merges)])}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    result = []
    for word in words_of(text):
        content = word.encode()
        symbols = [(bytes([byte]), position == len(content) - 1) for position, byte in enumerate(content)]
        while found := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
            first = min(found, key=ranks.get)
            joined, rest = [], symbols
            while rest:
                if tuple(rest[:2]) == first:
                    joined.append((first[0][0] + first[1][0], first[1][1]))
                    rest = rest[2:]
                else:
                    joined.append(rest[0])
                    rest = rest[1:]
            symbols = joined
        result += [ids[symbol] for symbol in symbols]
    return result


@st.composite
def merge_lists(draw):
    """Merges in an order that training may give: the parts of each are bytes, or merged before."""
    symbols, merges = list(SOME), []
    for _ in range(draw(st.integers(0, 30))):
        left = draw(st.sampled_from([symbol for symbol in symbols if not symbol[1]]))
        right = draw(st.sampled_from(symbols))
        joined = (left[0] + right[0], right[1])
        if joined not in symbols:
            symbols.append(joined)
            merges.append((left, right))
    return merges


def made(merges):
    """The tokenizer of `merges`, as it is read from its file."""
    written_merges = [(written(a), written(b)) for a, b in merges]
    return TokenizerJson(clip_tokenizer(written_merges).to_str().encode())


A, S, T, S_END, T_END = ((b"a", False), (b"s", False), (b"t", False), (b"s", True), (b"t", True))
# Merges that give pieces of up to four letters.
MERGES = [(A, S), (A, T_END), ((b"as", False), (b"at", True)), (S, T), ((b"st", False), S_END), (T, S_END)]


@settings(max_examples=100, deadline=None)
@given(merge_lists(), st.text("astASTſ1٢½'. \té😀日\u0301", max_size=30))
@example(MERGES, "asat  ASAT's sts  'll 12 a1t!? <|end|>. st's&lt;ats")
@example(MERGES, "it's they're WE'VE i'm x''d 'ſ '")
def test_ids_are_those_of_bpe_by_definition(merges, text):
    """Ids of any text and merges are those of a BPE that is written from its description."""
    tokenizer = made(merges)
    values, splits = tokenizer.splitter()([text.encode(), b"a"])
    expected = encode(text, merges)
    assert values[: splits[1]].tolist() == expected
    assert (tokenizer.start_ids, tokenizer.end_ids) == ((512 + len(merges),), (513 + len(merges),))
    assert tokenizer.join(expected) == " ".join(words_of(text))


def vocabulary(num_lines):
    """A vocabulary file with that many merges of two bytes."""
    pairs = itertools.islice(itertools.product(LETTERS.values(), repeat=2), num_lines)
    return "\n".join(["#version: 0.2", *map(" ".join, pairs), ""]).encode()


def wheel(content, name="open_clip/bpe_simple_vocab_16e6.txt.gz"):
    """A wheel that has this file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("open_clip/__init__.py", "")
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def packed():
    """A vocabulary with more merges than CLIP uses."""
    return gzip.compress(vocabulary(NUM_MERGES + 500), 1)


@pytest.mark.parametrize("pack", [bytes, wheel])
def test_command_writes_ids_as_clip_has_them(pack, packed, tmp_path, capsys):
    """Start 49406, end 49407, 49,408 pieces, and the sequence of a text tower, from a wheel or its file."""
    (tmp_path / "vocabulary").write_bytes(pack(packed))
    output = tmp_path / "tokenizer.json"
    command = ["clip", f"--vocabulary={tmp_path}/vocabulary", f"--output={output}"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{output}: 49,408 pieces\n"
    tokenizer = Tokenizer(str(output), length=6, vocab_size=49_408, always_end=True)
    pair = 512 + 256 * BYTES.index(ord("a")) + BYTES.index(ord("b"))  # "ab" before the end of a word
    end_of_word = 256 + BYTES.index(ord("c"))
    tokens, _ = tokenizer.encode([b"ABC", b"abc " * 9])
    assert tokens.tolist() == [
        [49_406, pair, end_of_word, 49_407, 49_407, 49_407],
        [49_406, pair, end_of_word, pair, end_of_word, 49_407],
    ]
    assert main(command) == 2
    assert "--output already exists" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda packed: None, "--vocabulary cannot be read, "),
        (lambda packed: b"neither", "--vocabulary cannot be read, Not a gzipped file"),
        (lambda packed: packed[:-2000], "--vocabulary cannot be read, "),
        (lambda packed: wheel(packed, "open_clip/other.gz"), "there is no bpe_simple_vocab_16e6.txt.gz in it"),
        (lambda packed: wheel(packed)[:-2000], "--vocabulary cannot be read, "),
        (lambda packed: gzip.compress(b"\xff"), "--vocabulary cannot be read, 'utf-8' codec"),
        (lambda packed: gzip.compress(vocabulary(NUM_MERGES - 1)), "has no 48,894 lines of two pieces"),
        (lambda packed: gzip.compress(vocabulary(NUM_MERGES).replace(b"a b\n", b"a b c\n")), "lines of two pieces"),
        (lambda packed: gzip.compress(bytes(65 << 20), 1), "more than 67,108,864 bytes"),
    ],
)
def test_unusable_vocabulary_is_a_user_error(change, message, packed, tmp_path, capsys):
    """Each gives one line and exit code 2, and nothing is written."""
    content = change(packed)
    if content is not None:
        (tmp_path / "vocabulary").write_bytes(content)
    assert main(["clip", f"--vocabulary={tmp_path}/vocabulary", f"--output={tmp_path}/tokenizer.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert "Give the wheel of open-clip-torch" in error and not (tmp_path / "tokenizer.json").exists()
