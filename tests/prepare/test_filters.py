"""Filters: which samples become unchanged records, and the reasons for dropping others."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.records import MAX_KEY_LETTERS
from aimv2_jax.data.transforms.decode import decode_image
from aimv2_jax.prepare.filters import MAX_CAPTIONS_PER_KIND, MAX_TEXT_LENGTH, DroppedSample, Rules, check, to_text
from aimv2_jax.prepare.inputs.samples import Sample

ALT = {"alt": "txt"}


def judged(image, rules=None, **fields):
    return check(Sample("k", image, {"txt": "A thing."} | fields), rules or Rules(ALT))


def reason(image, rules=None, **fields):
    with pytest.raises(DroppedSample) as dropped:
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


def make(make_image, options):
    if options.get("mode") == "I;16":
        import io

        buffer = io.BytesIO()
        Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)).save(buffer, "PNG")
        return buffer.getvalue()
    return make_image(**options)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("decode", [False, True])
def test_image_of_any_format_unchanged(make_image, name, decode):
    """An image of any supported format is stored unchanged."""
    image = make(make_image, GOOD[name])
    checked = judged(image, Rules(ALT, decode=decode))
    assert checked.record.image == image and checked.changes == ()
    assert checked.size == decode_image(image).size


def test_image_trailing_garbage_unchanged(make_image):
    """An image with garbage after it is stored unchanged."""
    image = make_image() + b"<html>garbage</html>" * 100
    assert judged(image, Rules(ALT, decode=True)).record.image == image


def test_image_cut_needs_full_decode(make_image):
    """Only a full decode detects that an image is cut."""
    cut = make_image()[:-700]
    assert judged(cut).size == (60, 40)
    assert reason(cut, Rules(ALT, decode=True)) == "undecodable_image"


def test_image_size_exif_rotation(make_image):
    """The size of an image on its side is that of the upright image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({}, {"format": "PNG"}, {"format": "WEBP"}):
        image = make_image(60, 40, exif=exif, **options)
        assert judged(image).size == decode_image(image).size == (40, 60)


def test_image_unusable_drop_reason(make_image, bitmap_header):
    """An unusable image is dropped with its reason."""
    for image, why in [
        (None, "no_image"),
        (b"", "empty_image"),
        (b"<html>404</html>", "undecodable_image"),
        (make_image()[:20], "undecodable_image"),
        (bitmap_header(0, 40), "undecodable_image"),
        (bitmap_header(10_000, 9_000), "oversized_image"),
        (bitmap_header(60_000, 60_000), "oversized_image"),
        (make_image(1, 1), "too_small"),
        (make_image(20_000, 1), "too_small"),
        (make_image(60, 31), "too_small"),
    ]:
        assert reason(image) == why
    assert reason(make_image(20_000, 1), Rules(ALT, min_side=1)) == "too_elongated"
    assert reason(make_image(1, 21), Rules(ALT, min_side=1)) == "too_elongated"
    assert judged(make_image(20, 1), Rules(ALT, min_side=1)).size == (20, 1)
    assert reason(make_image(60, 40), Rules(ALT, max_side=59)) == "too_large"
    assert judged(make_image(60, 40), Rules(ALT, max_side=60))


def test_caption_unchanged(make_image):
    """A caption that is not dropped is stored unchanged."""
    rules = Rules({"alt": "txt", "other": "json:other", "gone": "json:gone"})
    checked = judged(make_image(), rules, txt="  K\u00e4se &amp; BROT ".encode(), **{"json:other": 7})
    assert checked.record.captions == {"alt": "  K\u00e4se &amp; BROT ", "other": "7"}
    assert checked.changes == ()


@pytest.mark.parametrize("text", [None, "", b"", " \n", "\u200b", "&nbsp;", float("nan")])
def test_caption_when_nothing_is_left_after_cleaning_then_no_caption(make_image, text):
    assert reason(make_image(), txt=text) == "no_caption"
    rules = Rules({"alt": "txt", "other": "o"})
    assert judged(make_image(), rules, txt=text, o="words").record.captions == {"other": "words"}


@pytest.mark.parametrize(
    "text", ["K\u00e4se".encode("latin-1"), b"\xff\xfe\0a", "half \ud83d", [["a", "list"]], {"a": 1}]
)
def test_caption_not_utf8(make_image, text):
    """A caption that is not UTF-8 text is left out, and the change is recorded."""
    assert reason(make_image(), txt=text) == "caption_not_text"
    checked = judged(make_image(), Rules({"alt": "txt", "other": "o"}), txt=text, o="words")
    assert checked.record.captions == {"other": "words"} and checked.changes == ("caption_not_text",)


def test_caption_of_100_kb(make_image):
    """A caption of 100 kB is cut, and the change is recorded."""
    checked = judged(make_image(), txt="\u00e4" * 100_000)
    assert checked.record.captions == {"alt": "\u00e4" * MAX_TEXT_LENGTH} and checked.changes == ("caption_cut",)
    assert judged(make_image(), txt="\u00e4" * MAX_TEXT_LENGTH).changes == ()


def test_captions_of_a_kind_come_from_lists_and_several_fields(make_image):
    rules = Rules({"alt": "txt", "synthetic": ["one", "two"]})
    for fields, found in [
        ({"one": ["a", "b"]}, ["a", "b"]),
        ({"one": "a", "two": b"b"}, ["a", "b"]),
        ({"one": ["a", "b"], "two": "c"}, ["a", "b", "c"]),
        ({"one": ["", "a", None, " &nbsp; "], "two": None}, "a"),
        ({"one": ("a", "a")}, ["a", "a"]),
        ({"two": ["a"]}, "a"),
    ]:
        checked = judged(make_image(), rules, **fields)
        assert checked.record.captions == {"alt": "A thing.", "synthetic": found} and checked.changes == ()
    assert judged(make_image(), rules, one=[], two=[""]).record.captions == {"alt": "A thing."}
    assert reason(make_image(), rules, txt="", one=[], two=None) == "no_caption"


def test_caption_in_a_list_is_cut_or_left_out_alone(make_image):
    rules = Rules({"synthetic": "one"})
    long, texts = "x" * (MAX_TEXT_LENGTH + 1), [f"t{i}" for i in range(MAX_CAPTIONS_PER_KIND + 5)]
    for given, found, changes in [
        (["a", b"\xff", "b"], ["a", "b"], ("caption_not_text",)),
        (["a", ["b"], {"c": 1}], "a", ("caption_not_text",)),
        ([long, "b"], [long[:-1], "b"], ("caption_cut",)),
        (texts, texts[:MAX_CAPTIONS_PER_KIND], ("captions_left_out",)),
    ]:
        checked = judged(make_image(), rules, one=given)
        assert (checked.record.captions, checked.changes) == ({"synthetic": found}, changes)
    assert reason(make_image(), rules, one=[["a"], b"\xff"]) == "caption_not_text"


def test_key_of_20_mb_is_shortened_and_stays_its_own(make_image):
    keys = [check(Sample("k" * 20_000_000 + end, make_image(), {"txt": "x"}), Rules(ALT)).record.key for end in "ab"]
    assert keys[0] != keys[1] and {len(key) for key in keys} == {MAX_KEY_LETTERS}


def test_label_text_or_absent(make_image):
    """A label with a value is stored as text, and one without a value is absent."""
    rules = Rules(ALT, {name: name for name in ("a", "b", "c", "d", "e", "f")})
    checked = judged(make_image(), rules, a=b"x", b=None, c="", d=3, e=True, f=b"\xff")
    assert checked.record.labels == {"a": "x", "d": "3", "e": "true"}
    assert checked.changes == ("label_not_text",)


def test_keep_when_several_fields_then_all_must_hold_one_of_their_values(make_image):
    rules = Rules(ALT, keep={"kind": ("photo", "art"), "n": ("1",)})
    assert judged(make_image(), rules, kind=b"art", n=1)
    for fields in ({"kind": "art"}, {"kind": "drawn", "n": 1}, {"kind": "art", "n": 2}, {"kind": ["art"], "n": 1}):
        assert reason(make_image(), rules, **fields) == "not_kept"


def test_verify_when_the_digest_is_of_other_bytes_then_dropped(make_image):
    rules, image = Rules(ALT, verify="sum"), make_image()
    for digest in (hashlib.sha256(image).hexdigest(), hashlib.md5(image).hexdigest().upper().encode()):
        assert judged(image, rules, sum=digest).record.image == image
        assert reason(image + b"x", rules, sum=digest) == "checksum_mismatch"
    for digest in (None, "", "abc", 7, b"\xff" * 32):
        assert reason(image, rules, sum=digest) == "checksum_missing"
    assert reason(image, rules, sum="x" * 64) == "checksum_mismatch"


def test_key_when_of_bytes_that_are_no_text_then_still_a_key(make_image):
    sample = Sample(b"a\xff".decode("utf-8", "surrogateescape"), make_image(), {"txt": "x"})
    assert check(sample, Rules(ALT)).record.key == "a\\udcff"


def test_fields_when_asked_for_then_all_that_the_rules_name():
    rules = Rules({"alt": ["txt", "txt2"]}, {"l": "json:l", "m": "txt"}, {"k": ("1",)}, verify="v")
    assert rules.fields == ("txt", "txt2", "json:l", "k", "v")


def test_text_when_a_value_of_json_then_as_json_writes_it():
    assert [to_text(value) for value in (True, False, 0, 1.5, "x", b"y")] == ["true", "false", "0", "1.5", "x", "y"]
