"""Reading of webdataset tars, intact and damaged, and counts of lost samples."""

import gzip
import json
import random
import tarfile

import pytest

from aimv2_jax.data.transforms.decode import FORMAT_OF
from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import discover, open_files, reader, text_encoding, webdataset
from aimv2_jax.prepare.inputs.samples import BadInput, MapFile, Sample
from tests.helpers.small_inputs import header_offsets, image_bytes, lost, packed, pair, pairs, read_all


def expected(number):
    members = pair(number)
    tree = json.loads(members[f"{number:09d}.json"])
    fields = {"txt": members[f"{number:09d}.txt"], **{f"json:{name}": value for name, value in tree.items()}}
    return Sample(f"{number:09d}", image_bytes(number), fields)


@pytest.mark.parametrize("successes", [None, 5])
def test_tar_when_sound_then_its_pairs(shard, successes):
    assert read_all(shard(packed(pairs(5)), successes=successes)) == ([expected(n) for n in range(5)], [])


@pytest.mark.parametrize("name", ["00000.tar.gz", "packed.tar"])
def test_tar_when_packed_then_its_pairs(shard, name):
    assert read_all(shard(gzip.compress(packed(pairs(5))), name)) == ([expected(n) for n in range(5)], [])


def test_members_when_in_any_order_then_the_same_pairs(shard):
    members = list(pairs(20).items())
    random.Random(1).shuffle(members)
    samples, bad_inputs = read_all(shard(packed(members)))
    assert sorted(samples, key=lambda sample: sample.key) == [expected(n) for n in range(20)]
    assert bad_inputs == []


def test_samples_when_members_are_far_apart_then_in_the_order_of_their_first(shard):
    members = sorted(pairs(4).items(), key=lambda item: item[0].rpartition(".")[2])
    assert [sample.key for sample in read_all(shard(packed(members)))[0]] == [f"{n:09d}" for n in range(4)]


@pytest.mark.parametrize("suffix", [*FORMAT_OF, "JPG"])
def test_image_of_any_format(shard, suffix):
    """A member of any image format is the image of its sample."""
    [sample] = read_all(shard(packed(pair(0, suffix=suffix))))[0]
    assert sample == expected(0)


def test_member_when_its_stem_has_one_of_that_kind_then_left_aside_and_counted(shard):
    data = packed(pair(0) | {"000000000.png": b"second", "000000000.TXT": b"text"})
    for successes in (None, 1):
        samples, bad_inputs = read_all(shard(data, successes=successes))
        assert samples == [expected(0)]
        assert bad_inputs == [
            BadInput("second_member", 0, 6, "000000000"),
            BadInput("second_member", 0, 4, "000000000"),
        ]


def test_packed_tar_temporary_folder_full(shard, full_disk):
    """If the temporary folder is full, UserError blames the folder and not the packed tar."""
    found = shard(gzip.compress(packed(pairs(5))), "00000.tar.gz")
    with (
        full_disk,
        pytest.raises(UserError, match=r"no space in .*copy of an input \(No space.*00000\.tar\.gz'.*TMPDIR"),
    ):
        read_all(found)


def test_key_when_in_a_folder_then_the_path_without_suffix(shard):
    samples, _ = read_all(shard(packed({"./a/x.1.jpg": b"1", "./a/x.1.txt": b"t", "a/x.2.jpg": b"2"})))
    assert [(sample.key, sample.fields) for sample in samples] == [("a/x.1", {"txt": b"t"}), ("a/x.2", {})]


def test_members_when_of_no_pair_then_left_out(shard):
    members = {"README.md": b"", "._000000000.jpg": b"mac", "index.npy": b"1"}
    assert read_all(shard(packed(members | pair(0)))) == ([expected(0)], [])


@pytest.mark.parametrize("missing", ["jpg", "txt", "json"])
def test_member_when_missing_then_a_sample_without_it(shard, missing):
    members = pairs(3)
    del members[f"000000001.{missing}"]
    samples, bad_inputs = read_all(shard(packed(members), successes=3))
    assert bad_inputs == []
    assert [sample.key for sample in samples] == ["000000000", "000000001", "000000002"]
    assert (samples[1].image is None) == (missing == "jpg")
    assert ("txt" not in samples[1].fields) == (missing == "txt")
    assert ("json:caption" not in samples[1].fields) == (missing == "json")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b'{"a": ' + b"[" * 100_000, b"9" * 5000])
def test_json_broken(shard, text):
    """A sample with broken JSON is read without its fields, and the JSON is reported."""
    members = pairs(2) | {"000000001.json": text}
    samples, bad_inputs = read_all(shard(packed(members)))
    assert samples == [expected(0), Sample("000000001", image_bytes(1), {"txt": b"text 1"})]
    assert bad_inputs == [BadInput("broken_json", 0, len(text), "000000001")]


def test_text_when_not_utf8_then_as_it_was_stored(shard):
    members = {"a.jpg": b"1", "a.txt": b"caf\xe9", "a.json": b'{"alt": "caf\xe9", "half": "\\ud83d", "ok": "\xc3\xa9"}'}
    [sample], bad_inputs = read_all(shard(packed(members)))
    assert sample.fields == {
        "txt": b"caf\xe9",
        "json:alt": b"caf\xe9",
        "json:half": b"\xed\xa0\xbd",
        "json:ok": "é",
    }
    assert bad_inputs == []


def test_name_when_not_utf8_then_a_key_that_can_be_stored(shard):
    members = [("caf\udce9.jpg", b"1"), ("caf\udce9.txt", b"t"), ("caf\udcea.jpg", b"2")]
    data = packed(members, tarfile.GNU_FORMAT)
    samples, _ = read_all(shard(data))
    assert [(sample.key, sample.fields) for sample in samples] == [("caf\\xe9", {"txt": b"t"}), ("caf\\xea", {})]


def test_stem_when_it_comes_again_then_a_sample_of_its_own(shard):
    data = packed(pairs(2)) + packed(pairs(2))
    samples, bad_inputs = read_all(shard(data, successes=4))
    assert samples == [expected(0), expected(1)] * 2
    assert bad_inputs == []


def test_member_too_large(shard, monkeypatch):
    """A member that is larger than any image is not read."""
    monkeypatch.setattr(open_files, "MAX_FILE_BYTES", 5000)
    samples, bad_inputs = read_all(shard(packed(pairs(2) | {"000000000.jpg": bytes(6000)}), successes=2))
    assert [sample.image for sample in samples] == [None, image_bytes(1)]
    assert bad_inputs == [BadInput("damaged_tar", 0, 6000)]


# Damaged tars.


def test_header_when_damaged_then_half_a_pair_is_one_sample(shard):
    data = bytearray(packed(pairs(5)))
    data[header_offsets(data)["000000002.jpg"]] ^= 1
    samples, [bad_input] = read_all(shard(bytes(data), successes=5))
    assert [sample.image is None for sample in samples] == [False, False, True, False, False]
    assert [sample.key for sample in samples] == [f"{n:09d}" for n in range(5)]
    assert bad_input == BadInput("damaged_tar", 0, 512 + 1024)


def test_headers_of_whole_pair_damaged(shard):
    """If all headers of a pair are damaged, the statistics show that the pair is lost."""
    data = bytearray(packed(pairs(5)))
    for name, offset in header_offsets(data).items():
        if name.startswith("000000002"):
            data[offset] ^= 1
    samples, [bad_input] = read_all(shard(bytes(data), successes=5))
    assert [sample.key[-1] for sample in samples] == ["0", "1", "3", "4"]
    assert bad_input == BadInput("damaged_tar", 1, (512 + 1024) + 2 * 1024)
    samples, [bad_input] = read_all(shard(bytes(data), "other.tar"))
    assert (len(samples), bad_input.samples, bad_input.num_bytes) == (4, 0, 3584)


@pytest.mark.parametrize("successes", [None, 5])
def test_tar_when_cut_in_the_middle_then_the_pairs_before_it(shard, successes):
    data = packed(pairs(5))
    cut = header_offsets(data)["000000003.jpg"] + 512 + 100
    samples, [bad_input] = read_all(shard(data[:cut], successes=successes))
    assert samples == [expected(0), expected(1), expected(2)]
    # Without statistics, only the pair that has begun is known.
    assert bad_input == BadInput("damaged_tar", 1 if successes is None else 2, 612, "000000003")


def test_tar_cut_after_text_of_pair(shard):
    """A pair in a tar that is cut after the text of the pair is given without its image."""
    data = packed(sorted(pairs(2).items(), reverse=True))  # NAME.txt, NAME.json, NAME.jpg
    samples, bad_inputs = read_all(shard(data[: header_offsets(data)["000000000.jpg"] + 600]))
    assert [(sample.key, sample.image is None) for sample in samples] == [("000000001", False), ("000000000", True)]
    assert bad_inputs == [BadInput("damaged_tar", 0, 600)]


def test_tar_cut_between_pairs(shard):
    """If a tar is cut between two pairs, the statistics show how many pairs are lost."""
    data = packed(pairs(5))
    samples, [bad_input] = read_all(shard(data[: header_offsets(data)["000000003.jpg"]], successes=5))
    assert (len(samples), bad_input) == (3, BadInput("damaged_tar", 2, 0))


@pytest.mark.parametrize("num_bytes", [512, 10240])
def test_tar_when_of_zeros_then_all_that_was_announced_is_lost(shard, num_bytes):
    assert read_all(shard(bytes(num_bytes), successes=7)) == ([], [BadInput("damaged_tar", 7)])
    assert read_all(shard(bytes(num_bytes), successes=0)) == ([], [])
    assert read_all(shard(bytes(num_bytes), "other.tar")) == ([], [])


def test_tar_of_no_bytes(shard):
    """A tar of no bytes is reported as damaged."""
    assert read_all(shard(b"", successes=7)) == ([], [BadInput("damaged_tar", 7)])
    assert read_all(shard(b"", "other.tar")) == ([], [BadInput("damaged_tar", 0)])


def test_tar_when_junk_trails_then_its_pairs_and_the_bytes(shard):
    samples, bad_inputs = read_all(shard(packed(pairs(3)) + b"junk" * 300, successes=3))
    assert samples == [expected(n) for n in range(3)]
    assert bad_inputs == [BadInput("damaged_tar", 0, 1200)]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"successes": "3"}', '{"successes": -1}', '{"successes": true}', '{"successes": 3.0}']
    + [
        '{"successes": 99999999999999999999}',
        '{"successes": NaN}',
        '{"successes": 3, "x": ' + "[" * 200 + "]" * 200 + "}",
    ],
)
def test_statistics_when_unusable_then_the_tar_alone_counts(shard, tmp_path, text):
    (tmp_path / "00000_stats.json").write_text(text)
    samples, bad_inputs = read_all(shard(packed(pairs(3))))
    assert (len(samples), bad_inputs) == (3, [BadInput("wrong_stats", 0)])


def test_statistics_out_of_the_folder_are_not_believed(shard, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "private").write_text('{"successes": 7}')
    (folder / "0.tar").write_bytes(packed(pairs(3)))
    (folder / "0_stats.json").symlink_to("../private")
    [found] = discover.find_shards([str(folder / "0.tar")])
    samples, bad_inputs = read_all(found)
    assert (len(samples), bad_inputs) == (3, [BadInput("wrong_stats", 0)])
    [found] = discover.find_shards([str(folder / "0.tar")], follow_links=True)
    assert read_all(found)[1] == [BadInput("damaged_tar", 4)]


def test_statistics_when_of_fewer_than_the_whole_pairs_then_not_believed(shard):
    samples, bad_inputs = read_all(shard(packed(pairs(3)), successes=2))
    assert (len(samples), bad_inputs) == (3, [BadInput("wrong_stats", 0)])


def test_stems_when_more_than_announced_then_the_least_whole_are_fragments(shard):
    members = dict(pair(0))
    # The last three members belonged to one pair.
    members |= {
        "000000001.jpg": image_bytes(1),
        "00000000X.txt": b"text 1",
        "00000000Y.json": b"{}",
    }
    members |= pair(2)
    samples, bad_inputs = read_all(shard(packed(members), successes=3))
    assert [sample.key for sample in samples] == ["000000000", "000000001", "000000002"]
    assert bad_inputs == [BadInput("fragment", 0, 6, "00000000X"), BadInput("fragment", 0, 2, "00000000Y")]


def test_pair_when_repeated_beyond_what_is_announced_then_a_fragment(shard):
    members = list(pairs(3).items())
    samples, bad_inputs = read_all(shard(packed(members[:6] + members), successes=3))
    assert samples == [expected(n) for n in range(3)]
    assert [(bad_input.reason, bad_input.samples, bad_input.key) for bad_input in bad_inputs] == [
        ("fragment", 0, "000000000"),
        ("fragment", 0, "000000001"),
    ]


def test_statistics_when_of_fewer_pairs_and_the_tar_is_damaged_then_believed(shard):
    samples, bad_inputs = read_all(shard(packed(pairs(3)) + b"junk", successes=2))
    assert [sample.key for sample in samples] == ["000000000", "000000001"]
    assert [bad_input.reason for bad_input in bad_inputs] == ["fragment", "damaged_tar"]


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_packed_tar_when_cut_then_the_pairs_before_it(shard, cut):
    rng = random.Random(2)
    members = {name: data + rng.randbytes(2000) if "jpg" in name else data for name, data in pairs(50).items()}
    data = gzip.compress(packed(members))
    samples, bad_inputs = read_all(shard(data[: int(len(data) * cut)], "00000.tar.gz", successes=50))
    assert 50 * cut - 5 < len(samples) < 50
    assert len(samples) + lost(bad_inputs) == 50
    assert bad_inputs[-1].num_bytes > 0


def test_packed_tar_when_its_bytes_are_damaged_then_the_rest_is_counted(shard):
    data = bytearray(gzip.compress(packed(pairs(50))))
    data[len(data) // 2] ^= 0xFF
    samples, bad_inputs = read_all(shard(bytes(data), "00000.tar.gz", successes=50))
    assert len(samples) + lost(bad_inputs) == 50
    assert bad_inputs[-1].num_bytes > 0


def test_packed_tar_is_unpacked_up_to_a_limit(shard, monkeypatch):
    """A bomb loses the members after it, and uses no more disk space than the limit."""
    monkeypatch.setattr(open_files, "_MIN_BOMB_BYTES", 50_000)
    members = [*pairs(3).items(), ("zeros", bytes(10 << 20)), *pair(7).items()]
    data = gzip.compress(packed(members))
    monkeypatch.setattr(open_files, "_MAX_EXPANSION", 1)
    found = shard(data, "00000.tar.gz", successes=4)
    samples, [bad_input] = read_all(found)
    assert samples == [expected(n) for n in range(3)]
    assert (bad_input.reason, bad_input.samples, bad_input.num_bytes > 0) == ("decompression_bomb", 1, True)
    with webdataset._open_tar(found.path) as tar:
        assert tar.num_bytes == 50_000


def test_packed_tar_at_the_limit_is_sound(shard, monkeypatch):
    data = packed(pairs(3))
    monkeypatch.setattr(open_files, "_MIN_BOMB_BYTES", len(data) + 1)
    monkeypatch.setattr(open_files, "_MAX_EXPANSION", 0)
    assert read_all(shard(gzip.compress(data), "00000.tar.gz")) == ([expected(n) for n in range(3)], [])


def test_json_that_is_too_large_is_not_parsed(shard, monkeypatch):
    monkeypatch.setattr(text_encoding, "_MAX_OBJECT_BYTES", 100)
    samples, bad_inputs = read_all(shard(packed(pair(0) | {"000000000.json": b'{"a": "%s"}' % (b"x" * 100)})))
    assert samples[0].fields == {"txt": b"text 0"}
    assert [bad_input.reason for bad_input in bad_inputs] == ["broken_json"]


def test_json_may_hold_nan(shard):
    """pandas, and thus img2dataset, writes NaN for missing values."""
    [sample], bad_inputs = read_all(shard(packed(pair(0) | {"000000000.json": b'{"similarity": NaN, "caption": "a"}'})))
    assert sample.fields["json:caption"] == "a"
    assert bad_inputs == []


# Fields.


def by_suffix(count, *suffixes):
    """Pairs whose members are grouped by kind."""
    members = pairs(count)
    return {name: members[name] for suffix in suffixes for name in members if name.endswith(suffix)}


@pytest.mark.parametrize("order", [("txt", "jpg", "json"), ("json", "jpg", "txt"), ("jpg", "txt", "json")])
def test_fields_far_behind_first(shard, monkeypatch, order):
    """Fields far behind the first ones are recognised."""
    monkeypatch.setattr(webdataset, "_HEAD_BYTES", 30_000)  # Covers the first kind and some of the second.
    found = shard(packed(by_suffix(20, *order)))
    assert {"txt", "json:caption"} <= set(webdataset.fields(found))
    reader.check_fields([found], ["txt", "json:caption"])
    assert reader.default_captions(found) == {"alt": "txt"}


def test_field_of_late_sample(shard, monkeypatch):
    """A field that only a late sample has is recognised if it is asked for."""
    monkeypatch.setattr(webdataset, "_HEAD_BYTES", 10_000)
    monkeypatch.setattr(webdataset, "_MAX_JSONS_PROBED", 2)
    members = pairs(20) | {"000000019.json": b'{"late": "x"}'}
    found = shard(packed(members))
    assert "json:late" not in webdataset.fields(found)
    reader.check_fields([found], ["json:late"])
    with pytest.raises(UserError, match="no such field"):
        reader.check_fields([found], ["json:never"])


def test_fields_of_a_usual_tar_take_its_head_only(shard, monkeypatch):
    monkeypatch.setattr(webdataset, "_HEAD_BYTES", 10_000)
    found = shard(packed(pairs(20)))
    monkeypatch.setattr(webdataset, "_open_tar", None)
    assert "json:synthetic" in webdataset.fields(found, ["txt", "json:caption"])


def test_fields_when_asked_then_those_of_the_first_samples(shard):
    found = shard(packed(pairs(3)))
    assert webdataset.fields(found) == ["txt", "json:key", "json:caption", "json:synthetic"]


def test_fields_after_all_images(shard, monkeypatch):
    """Fields are recognised behind the images if all images come first."""
    monkeypatch.setattr(webdataset, "_HEAD_BYTES", 2000)
    members = sorted(pairs(4).items(), key=lambda item: item[0].rpartition(".")[2])
    assert "json:synthetic" in webdataset.fields(shard(packed(members)))


def test_fields_of_packed_tar(shard):
    """The fields of a packed tar are recognised."""
    assert "txt" in webdataset.fields(shard(gzip.compress(packed(pairs(3))), "a.tgz"))


def test_fields_when_nothing_can_be_read_then_none(shard):
    assert webdataset.fields(shard(b"junk" * 999)) is None


def test_second_images_belong_to_their_samples(shard):
    """Members KEY.SUFFIX of a wanted suffix are second images of KEY; without --image they are samples as before."""
    members = {f"a.b/{n}{suffix}": b"%d" % n for n in range(3) for suffix in (".seg.v2.png", ".jpg", ".txt")}
    del members["a.b/1.seg.v2.png"]
    found = shard(packed(members), successes=3)
    assert reader.FORMATS["webdataset"].maps(found) == ["seg.v2.png"]
    samples = list(reader.read(found, maps=["seg.v2.png"]))
    assert [sample.key for sample in samples] == ["a.b/0", "a.b/1", "a.b/2"]
    assert [sample.image for sample in samples] == [b"0", b"1", b"2"]
    assert [list(sample.maps.values()) for sample in samples] == [[MapFile(b"0")], [], [MapFile(b"2")]]
    [alone] = reader.FORMATS["webdataset"].maps(shard(packed({"x.v2.jpg": b"x"}), "1.tar")) or [None]
    assert alone is None and len(read_all(shard(packed(members), "2.tar"))[0]) == 5
