"""Tokenizer training: the captions read, a reproducible file, and rejected arguments."""

import pytest
import sentencepiece

from aimv2_jax.data.records import decode
from aimv2_jax.data.sources import Source
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.data.transforms import captions
from aimv2_jax.prepare.tokenizer import main, sample_captions, train_model
from aimv2_jax.storage.paths import resolve_path

SAMPLE = resolve_path("package:data/sample")
PHOTO, OTHER = str(SAMPLE / "train/photo"), str(SAMPLE / "train/other")


class Watched(Source):
    """A source that records the indices of its reads."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def read(self, index):
        self.seen.append(index)
        return super().read(index)


@pytest.fixture
def sources(datasets):
    return [
        Watched("red", datasets["red"]),
        Watched("blue", datasets["blue"]),
    ]  # 13 and 7 records, with two kinds each.


def test_sample_when_the_limit_is_high_then_every_caption_cleaned_and_in_order(sources, make_record):
    texts, unusable = sample_captions(sources)
    records = [make_record("red", i) for i in range(13)] + [make_record("blue", i) for i in range(7)]
    assert texts == [captions.clean(record.captions[kind]) for record in records for kind in ("alt", "synthetic")]
    assert unusable == 0


def test_sample_when_capped_then_no_more_is_read_and_the_sets_give_the_same(sources):
    texts, _ = sample_captions(sources, limit=8)
    assert [sum(name in text for text in texts) for name in ("red", "blue")] == [4, 4]
    assert [len(source.seen) for source in sources] == [2, 2]


def test_sample_when_one_set_is_small_then_all_of_it_and_the_rest_from_the_others(sources):
    texts, _ = sample_captions(sources, ["alt"], limit=18)
    assert [sum(name in text for text in texts) for name in ("red", "blue")] == [11, 7]
    assert sources[0].seen == sorted(set(sources[0].seen)) and len(sources[0].seen) == 11


def test_sample_of_records_with_several_captions_takes_all_and_reads_fewer(make_dataset):
    folder = make_dataset("red", 12, {i: {"captions": {"alt": [f"{n} of {i}" for n in range(3)]}} for i in range(12)})
    source = Watched("red", folder)
    assert sample_captions([source]) == ([f"{n} of {i}" for i in range(12) for n in range(3)], 0)
    source.seen.clear()
    assert len(sample_captions([source], limit=9)[0]) == 9 and len(source.seen) == 3


def test_sample_size_equals_odd_limit(sources):
    """The sample has exactly as many captions as an odd limit says."""
    for limit in (1, 3, 5, 39, 40, 41):
        assert len(sample_captions(sources, limit=limit)[0]) == min(limit, 40)


def test_sample_when_the_seed_is_the_same_then_the_same_captions_and_else_others(sources):
    chosen = [sample_captions(sources, ["alt"], limit=8, seed=seed)[0] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_sample_when_records_are_unusable_or_long_then_counted_left_out_and_cut(make_dataset):
    changes = {1: {"captions": {"alt": " \u200b "}}, 2: {"captions": {"synthetic": "x" * 100_000}}}
    texts, unusable = sample_captions([Source("odd", make_dataset("odd", 4, changes))])
    assert (len(texts), unusable, max(map(len, texts))) == (5, 1, 1000)


def test_train_model_when_given_the_sample_then_the_bundled_file_byte_for_byte():
    pairs = sorted(
        (record.key.split("/", 1), record)
        for source in (Source("photo", PHOTO), Source("other", OTHER))
        for record in (decode(source.read(i)) for i in range(len(source)))
    )
    texts = [captions.clean(record.captions[kind]) for _, record in pairs for kind in ("alt", "synthetic")]
    assert train_model(texts, 768) == (SAMPLE / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_main_when_run_twice_then_the_same_file_which_the_tokenizer_reads(tmp_path, capsys, model_type):
    files = [tmp_path / "one.model", tmp_path / "two.model"]
    for file in files:
        flags = ["--vocab-size", "400", "--model-type", model_type, "--max-captions", "300", "--kind", "alt"]
        assert main(["train", "--input", PHOTO, OTHER, "--output", str(file), *flags]) == 0
        assert capsys.readouterr().out == f"{file}: 400 pieces from 300 captions of 2 datasets\n"
    assert files[0].read_bytes() == files[1].read_bytes()
    tokenizer = Tokenizer(str(files[0]), 40, 400)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    tokens, token_valid = tokenizer.encode(["a photograph of 日本".encode()])
    assert tokenizer.decode(tokens[0]) == "a photograph of 日本" and 2 not in tokens[token_valid]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.model", "two.model"]


def test_main_when_without_byte_fallback_then_rare_letters_are_unknown(tmp_path):
    file = tmp_path / "some.model"
    assert main(["train", "--input", PHOTO, "--vocab-size", "300", "--output", str(file), "--no-byte-fallback"]) == 0
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert pieces.unk_id() in pieces.encode("日") and not any(pieces.is_byte(i) for i in range(300))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--input": "/nowhere"}, "--input: no such folder: '/nowhere'"),
        ({"--input": "{tmp}"}, "--input: the folder has no dataset.json"),
        ({"--kind": "alt2"}, "no captions of --kind: ['alt2']. Its kinds: alt, synthetic."),
        ({"--vocab-size": "90000"}, "too large for 418 captions: 90000. Give --vocab-size "),
        ({"--vocab-size": "20"}, "too small for the 294 "),
        ({"--output": "{tmp}/none/a.model"}, "--output: no such folder"),
        ({"--output": "{tmp}"}, "--output is a folder"),
        ({"--output": "{tmp}/there.model"}, "Give another file, or --overwrite"),
    ],
)
def test_main_user_errors(tmp_path, capsys, changes, message):
    """An error that the user can fix gives one line and exit code 2."""
    (tmp_path / "there.model").write_bytes(b"kept")
    flags = {"--input": PHOTO, "--vocab-size": "300", "--output": "{tmp}/new.model"} | changes
    words = [word.replace("{tmp}", str(tmp_path)) for pair in flags.items() for word in pair]
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"there.model": b"kept"}


def test_main_when_the_vocabulary_is_too_large_then_the_size_it_names_works(tmp_path, capsys):
    arguments = ["train", "--input", PHOTO, "--output", str(tmp_path / "a.model"), "--vocab-size"]
    assert main([*arguments, "90000"]) == 2
    most = capsys.readouterr().err.split("--vocab-size ")[1].split()[0]
    assert main([*arguments, most]) == 0


def test_main_overwrite(tmp_path):
    """An existing file is replaced if --overwrite is given."""
    (tmp_path / "a.model").write_bytes(b"old")
    arguments = ["train", "--input", PHOTO, "--vocab-size", "320", "--output", str(tmp_path / "a.model"), "--overwrite"]
    assert main(arguments) == 0
    assert Tokenizer(str(tmp_path / "a.model"), 12, 320).num_pieces == 320


def test_main_when_no_caption_is_usable_then_code_2(make_dataset, tmp_path, capsys):
    folder = make_dataset("mute", 2, {i: {"captions": {"alt": " "}} for i in range(2)})
    assert main(["train", "--input", folder, "--vocab-size", "300", "--output", str(tmp_path / "a.model")]) == 2
    assert "no usable caption" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--vocab-size", "0"], ["--character-coverage", "2"], ["--model-type", "word"], ["--max-captions", "x"]]
)
def test_main_when_a_flag_is_wrong_then_code_2_and_named(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--input", PHOTO, "--vocab-size", "9", "--output", str(tmp_path / "a"), *flags])
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_main_when_asked_for_help_then_code_0(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0 and "vocab-size" in capsys.readouterr().out
