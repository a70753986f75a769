"""Checks: which samples become records, as they were, and why others do not."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.inputs.samples import Sample
from aimv2_jax.data.pictures import decode_image
from aimv2_jax.data.preparing.checks import MOST_CAPTIONS, MOST_LETTERS, Dropped, Rules, check, text_of
from aimv2_jax.data.records import MAX_KEY_LETTERS

ALT = {"alt": "txt"}


def judged(image, rules=None, **fields):
    return check(Sample("k", image, {"txt": "A thing."} | fields), rules or Rules(ALT))


def reason(image, rules=None, **fields):
    with pytest.raises(Dropped) as dropped:
        judged(image, rules, **fields)
    return dropped.value.reason


GOOD = {
    "JPEG": {},
    "CMYK JPEG": {"mode": "CMYK"},
    "grey JPEG": {"mode": "L"},
    "16-bit PNG": {"format": "PNG", "mode": "I;16"},
    "palette PNG": {"format": "PNG", "mode": "P"},
    "PNG with alpha": {"format": "PNG", "mode": "RGBA"},
    "WebP": {"format": "WEBP"},
    "animated WebP": {"format": "WEBP", "save_all": True, "append_images": [Image.new("RGB", (60, 40), "red")]},
    "GIF": {"format": "GIF"},
    "20:1": {"width": 800, "height": 40},
}


def make(picture, options):
    if options.get("mode") == "I;16":
        import io

        buffer = io.BytesIO()
        Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)).save(buffer, "PNG")
        return buffer.getvalue()
    return picture(**options)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("decode", [False, True])
def test_picture_when_of_any_sort_then_kept_as_it_was(picture, name, decode):
    image = make(picture, GOOD[name])
    checked = judged(image, Rules(ALT, decode=decode))
    assert checked.record.image == image and checked.changes == ()
    assert checked.size == decode_image(image).size


def test_picture_when_garbage_follows_then_kept_as_it_was(picture):
    image = picture() + b"<html>garbage</html>" * 100
    assert judged(image, Rules(ALT, decode=True)).record.image == image


def test_picture_when_cut_then_found_by_a_full_decode_only(picture):
    cut = picture()[:-700]
    assert judged(cut).size == (60, 40)
    assert reason(cut, Rules(ALT, decode=True)) == "undecodable_image"


def test_picture_when_it_lies_then_its_size_is_as_it_is_meant_to_be_seen(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({}, {"format": "PNG"}, {"format": "WEBP"}):
        image = picture(60, 40, exif=exif, **options)
        assert judged(image).size == decode_image(image).size == (40, 60)


def test_picture_when_unusable_then_dropped_for_its_reason(picture, bitmap_header):
    for image, why in [
        (None, "no_image"),
        (b"", "empty_image"),
        (b"<html>404</html>", "undecodable_image"),
        (picture()[:20], "undecodable_image"),
        (bitmap_header(0, 40), "undecodable_image"),
        (bitmap_header(10_000, 9_000), "oversized_image"),
        (bitmap_header(60_000, 60_000), "oversized_image"),
        (picture(1, 1), "too_small"),
        (picture(20_000, 1), "too_small"),
        (picture(60, 31), "too_small"),
    ]:
        assert reason(image) == why
    assert reason(picture(20_000, 1), Rules(ALT, min_side=1)) == "too_elongated"
    assert reason(picture(1, 21), Rules(ALT, min_side=1)) == "too_elongated"
    assert judged(picture(20, 1), Rules(ALT, min_side=1)).size == (20, 1)
    assert reason(picture(60, 40), Rules(ALT, max_side=59)) == "too_large"
    assert judged(picture(60, 40), Rules(ALT, max_side=60))


def test_caption_when_kept_then_as_it_was(picture):
    rules = Rules({"alt": "txt", "other": "json:other", "gone": "json:gone"})
    checked = judged(picture(), rules, txt="  K\u00e4se &amp; BROT ".encode(), **{"json:other": 7})
    assert checked.record.captions == {"alt": "  K\u00e4se &amp; BROT ", "other": "7"}
    assert checked.changes == ()


@pytest.mark.parametrize("text", [None, "", b"", " \n", "\u200b", "&nbsp;", float("nan")])
def test_caption_when_nothing_is_left_after_cleaning_then_no_caption(picture, text):
    assert reason(picture(), txt=text) == "no_caption"
    rules = Rules({"alt": "txt", "other": "o"})
    assert judged(picture(), rules, txt=text, o="words").record.captions == {"other": "words"}


@pytest.mark.parametrize(
    "text", ["K\u00e4se".encode("latin-1"), b"\xff\xfe\0a", "half \ud83d", [["a", "list"]], {"a": 1}]
)
def test_caption_when_not_utf_8_text_then_left_out_and_told(picture, text):
    assert reason(picture(), txt=text) == "caption_not_text"
    checked = judged(picture(), Rules({"alt": "txt", "other": "o"}), txt=text, o="words")
    assert checked.record.captions == {"other": "words"} and checked.changes == ("caption_not_text",)


def test_caption_when_of_100_kb_then_cut_and_told(picture):
    checked = judged(picture(), txt="\u00e4" * 100_000)
    assert checked.record.captions == {"alt": "\u00e4" * MOST_LETTERS} and checked.changes == ("caption_cut",)
    assert judged(picture(), txt="\u00e4" * MOST_LETTERS).changes == ()


def test_captions_of_a_kind_come_from_lists_and_several_fields(picture):
    rules = Rules({"alt": "txt", "synthetic": ["one", "two"]})
    for fields, found in [
        ({"one": ["a", "b"]}, ["a", "b"]),
        ({"one": "a", "two": b"b"}, ["a", "b"]),
        ({"one": ["a", "b"], "two": "c"}, ["a", "b", "c"]),
        ({"one": ["", "a", None, " &nbsp; "], "two": None}, "a"),
        ({"one": ("a", "a")}, ["a", "a"]),
        ({"two": ["a"]}, "a"),
    ]:
        checked = judged(picture(), rules, **fields)
        assert checked.record.captions == {"alt": "A thing.", "synthetic": found} and checked.changes == ()
    assert judged(picture(), rules, one=[], two=[""]).record.captions == {"alt": "A thing."}
    assert reason(picture(), rules, txt="", one=[], two=None) == "no_caption"


def test_caption_in_a_list_is_cut_or_left_out_alone(picture):
    rules = Rules({"synthetic": "one"})
    long, texts = "x" * (MOST_LETTERS + 1), [f"t{i}" for i in range(MOST_CAPTIONS + 5)]
    for given, found, changes in [
        (["a", b"\xff", "b"], ["a", "b"], ("caption_not_text",)),
        (["a", ["b"], {"c": 1}], "a", ("caption_not_text",)),
        ([long, "b"], [long[:-1], "b"], ("caption_cut",)),
        (texts, texts[:MOST_CAPTIONS], ("captions_left_out",)),
    ]:
        checked = judged(picture(), rules, one=given)
        assert (checked.record.captions, checked.changes) == ({"synthetic": found}, changes)
    assert reason(picture(), rules, one=[["a"], b"\xff"]) == "caption_not_text"


def test_key_of_20_mb_is_shortened_and_stays_its_own(picture):
    keys = [check(Sample("k" * 20_000_000 + end, picture(), {"txt": "x"}), Rules(ALT)).record.key for end in "ab"]
    assert keys[0] != keys[1] and {len(key) for key in keys} == {MAX_KEY_LETTERS}


def test_label_when_there_then_text_and_otherwise_absent(picture):
    rules = Rules(ALT, {name: name for name in ("a", "b", "c", "d", "e", "f")})
    checked = judged(picture(), rules, a=b"x", b=None, c="", d=3, e=True, f=b"\xff")
    assert checked.record.labels == {"a": "x", "d": "3", "e": "true"}
    assert checked.changes == ("label_not_text",)


def test_keep_when_several_fields_then_all_must_hold_one_of_their_values(picture):
    rules = Rules(ALT, keep={"kind": ("photo", "art"), "n": ("1",)})
    assert judged(picture(), rules, kind=b"art", n=1)
    for fields in ({"kind": "art"}, {"kind": "drawn", "n": 1}, {"kind": "art", "n": 2}, {"kind": ["art"], "n": 1}):
        assert reason(picture(), rules, **fields) == "not_kept"


def test_verify_when_the_digest_is_of_other_bytes_then_dropped(picture):
    rules, image = Rules(ALT, verify="sum"), picture()
    for digest in (hashlib.sha256(image).hexdigest(), hashlib.md5(image).hexdigest().upper().encode()):
        assert judged(image, rules, sum=digest).record.image == image
        assert reason(image + b"x", rules, sum=digest) == "checksum_mismatch"
    for digest in (None, "", "abc", 7, b"\xff" * 32):
        assert reason(image, rules, sum=digest) == "checksum_missing"
    assert reason(image, rules, sum="x" * 64) == "checksum_mismatch"


def test_key_when_of_bytes_that_are_no_text_then_still_a_key(picture):
    sample = Sample(b"a\xff".decode("utf-8", "surrogateescape"), picture(), {"txt": "x"})
    assert check(sample, Rules(ALT)).record.key == "a\\udcff"


def test_fields_when_asked_for_then_all_that_the_rules_name():
    rules = Rules({"alt": ["txt", "txt2"]}, {"l": "json:l", "m": "txt"}, {"k": ("1",)}, verify="v")
    assert rules.fields == ("txt", "txt2", "json:l", "k", "v")


def test_text_when_a_value_of_json_then_as_json_writes_it():
    assert [text_of(value) for value in (True, False, 0, 1.5, "x", b"y")] == ["true", "false", "0", "1.5", "x", "y"]
