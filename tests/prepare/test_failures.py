"""Failures of a preparation and their messages: unusual inputs, outputs and runners."""

import gzip
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial

import pytest

from aimv2_jax.data.shards import ShardWriter, move_into
from aimv2_jax.prepare import filters, runners, worker
from aimv2_jax.prepare.__main__ import main
from aimv2_jax.prepare.slow_samples import SlowSampleLog
from tests.helpers.full_disk import files_of_at_most

GOOD = {"txt": b"A thing.", "json": {"alt": "A thing."}}


@pytest.fixture
def run(tmp_path, capsys):
    def run(given, *flags, output=None):
        """Returns the exit code and the printed text."""
        capsys.readouterr()
        code = main(["--input", str(given), "--output", str(output or tmp_path / "out"), *map(str, flags)])
        return code, "".join(capsys.readouterr())

    return run


def refused(result):
    code, said = result
    assert code == 2 and re.fullmatch(r"error: .*\.\n", said), said
    return said


def test_input_when_its_first_tars_are_empty_or_damaged_then_the_others_are_prepared(
    run, tmp_path, make_tar, make_image
):
    given = tmp_path / "given"
    make_tar(given / "0.tar", {})
    for number in range(1, 5):
        (given / f"{number}.tar").write_bytes(b"junk" * 1000 * (number - 1))
    make_tar(given / "5.tar", {"a": {"jpg": make_image()} | GOOD})
    code, said = run(given, "--workers", 1)
    assert code == 0 and said.startswith("1 records of 1 samples")


def test_field_missing_in_one_tar(run, tmp_path, make_tar, make_image):
    """The samples of a tar that lacks a field are dropped, and the others are prepared."""
    given = tmp_path / "given"
    make_tar(given / "0.tar", {"bad": {"jpg": make_image(), "txt": b"A thing.", "json": b"{"}})
    for shard in range(1, 8):
        members = {"jpg": make_image()} | GOOD | ({"json": {"other": "x"}} if shard == 7 else {})
        make_tar(given / f"{shard}.tar", {f"s{shard}": members})
    code, said = run(given, "--caption", "alt=json:alt", "--workers", 1)
    assert code == 0 and "6 records of 8 samples" in said and "dropped: 2 no_caption (first: bad)" in said
    assert "It has txt, json:alt" in refused(run(given, "--label", "a=json:missing", output=tmp_path / "other"))


@pytest.mark.parametrize("data", [b"", b"x", bytes(10240)])
def test_input_when_it_has_no_samples_then_that_is_said(run, tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    assert re.search(r"--input has no samples.*a\.tar'\. Give undamaged files", refused(run(tmp_path / "a.tar")))


def test_input_and_output_when_empty_then_not_the_current_folder(run, tmp_path, tars, monkeypatch, capsys):
    monkeypatch.chdir(tars)
    assert "--input is empty: ''" in refused(run(""))
    assert main(["--input", str(tars), "--output", ""]) == 2
    assert "--output is not a valid folder name: ''" in capsys.readouterr().err


def test_output_error_not_a_folder(run, tmp_path, tars):
    """An --output that cannot be a folder is an error that says so."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere/at/all")
    assert "--output cannot be created" in refused(run(tars, output=tmp_path / "link"))
    for name in ("a\0b", "a\udcff"):  # The second is not UTF-8.
        assert "--output is not a valid folder name" in refused(run(tars, output=name))


def test_disk_when_full_at_the_start_then_the_file_is_named(run, tars):
    with files_of_at_most(10):
        assert re.search(r"File too large: '.*/\.parts/tasks\.jsonl'", refused(run(tars)))


def test_temporary_folder_error_no_space(run, tmp_path, tars):
    """The error for temporary files without space blames their folder and not the input."""
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tars / "00000.tar").read_bytes()))
    with files_of_at_most(20_000):
        said = refused(run(tmp_path / "a.tar.gz", "--workers", 1))
    assert f"no space in {tempfile.gettempdir()} for the copy of an input (File too large): '" in said
    assert "a.tar.gz'" in said and "TMPDIR" in said


@pytest.mark.parametrize("flag", ["--caption", "--label"])
@pytest.mark.parametrize("name", [" ", "a\nb", "a\udcff", "a ", "x" * 101])
def test_caption_or_label_name_error(tmp_path, tars, capsys, flag, name):
    """A name of captions or labels that no one could type is refused."""
    with pytest.raises(SystemExit) as stopped:
        main(["--input", str(tars), "--output", str(tmp_path / "out"), flag, f"{name}=txt"])
    said = capsys.readouterr().err
    assert (
        stopped.value.code == 2 and said.count("\n") == 1 and "is not a name of up to 100 printable characters" in said
    )


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff", b'{"shards": []}', b'{"shards": [], "stats": {}}']
)
def test_resume_with_damaged_notes(run, tmp_path, tars, files_of, monkeypatch, data):
    """A task whose notes are damaged is done again on --resume; damaged notes of the command are an error."""
    flags = ("--shard-size", "200KB", "--workers", 1)
    assert run(tars, *flags, output=tmp_path / "straight")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("aimv2_jax.prepare.__main__._finish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
        assert run(tars, *flags)[0] == 2
    notes = tmp_path / "out/.parts"
    command = (notes / "command.json").read_text()
    (notes / "command.json").write_bytes(data)
    said = refused(run(tars, *flags, "--resume"))
    assert "command.json cannot be read" in said or "--input finds other files" in said
    (notes / "command.json").write_text(command)
    (notes / "00000.json").write_bytes(data)
    assert run(tars, *flags, "--resume")[0] == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")


def test_shard_when_its_folder_is_gone_then_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError), ShardWriter(tmp_path / "gone", move_into(tmp_path), 10) as writer:
        writer.write(b"item")


def test_processes_when_started_under_it_then_ctrl_c_does_not_reach_them():
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with runners._no_interrupt():
        blocked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert blocked.stdout == "True\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--runner=NoSuchRunner", "Unexpected pipeline runner: NoSuchRunner"),
        ("--direct_num_workers=x", "invalid int value: 'x'"),
        ("--runner='open", "No closing quotation"),
    ],
)
def test_beam_options_when_wrong_then_one_line_with_beams_own_word(run, tars, options, says):
    said = refused(run(tars, "--runner", "beam", f"--beam-options={options}"))
    assert "--beam-options cannot be used" in said and says in said


def test_beam_when_it_has_run_then_it_leaves_no_temporary_files(run, tars, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    assert run(tars, "--runner", "beam")[0] == 0
    assert not list((tmp_path / "tmp").iterdir()) and tempfile.tempdir == str(tmp_path / "tmp")


def _fail(error):
    raise error


def test_beam_when_interrupted_in_a_task_then_interrupted_and_a_bug_stays_a_bug(run, tars, tmp_path, monkeypatch):
    monkeypatch.setattr(worker.Job, "run", lambda *_: _fail(KeyboardInterrupt()))
    assert run(tars, "--runner", "beam") == (130, "interrupted\n")
    monkeypatch.setattr(worker.Job, "run", lambda *_: _fail(ZeroDivisionError()))
    with pytest.raises(Exception, match="ZeroDivisionError"):
        run(tars, "--runner", "beam", "--resume")


def test_beam_error_runner_cannot_start(run, tars, monkeypatch):
    """A Beam runner that cannot be started is an error that says so."""
    import apache_beam

    monkeypatch.setattr(apache_beam.Pipeline, "run", lambda *_, **__: _fail(RuntimeError("no server\nat all")))
    said = refused(run(tars, "--runner", "beam"))
    assert "Beam could not run (no server at all)" in said and "--resume" in said


def test_input_error_unknown_storage_scheme(run):
    """An input of an unknown kind of storage is an error that says so."""
    assert "--input: no such kind of storage: 'https://a.b/c.tar'" in refused(run("https://a.b/c.tar"))


def test_report_has_no_control_characters_of_keys(run, tmp_path, make_tar, make_image):
    key = "\x1b]0;PWNED\x07\x1b[2J\r\n5 records of 5 samples\n"
    make_tar(tmp_path / "a.tar", {"a": {"jpg": make_image()} | GOOD, key: {"jpg": b"no image"} | GOOD})
    code, said = run(tmp_path / "a.tar", "--workers", 1)
    assert code == 0 and said.startswith("1 records of 2 samples")
    assert all(line.isprintable() for line in said.splitlines())
    assert r"(first: \x1b]0;PWNED\x07\x1b[2J\r\n5 records of 5 samples\n)" in said


@pytest.fixture
def one_dropped(tmp_path, make_tar, make_image):
    """A tar with a good sample and a dropped one whose key is not ASCII."""
    return make_tar(tmp_path / "a.tar", {"a": {"jpg": make_image()} | GOOD, "ünï": {"jpg": b"no image"} | GOOD})


def test_report_is_escaped_where_the_output_is_ascii(run, monkeypatch, one_dropped):
    output = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert run(one_dropped, "--workers", 1)[0] == 0
    assert rb"(first: \xfcn\xef)" in output.buffer.getvalue()


def test_report_when_reader_exits_early(run, tmp_path, monkeypatch, one_dropped):
    """The run succeeds even if the reader of its output exits early, as in `prepare ... | true`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert run(one_dropped, "--workers", 1)[0] == 0
    assert (tmp_path / "out/dataset.json").exists()


def test_links_are_dropped_with_the_remedy(run, tmp_path, make_image):
    folder = tmp_path / "subset"
    folder.mkdir()
    (tmp_path / "a.jpg").write_bytes(make_image())
    for number in range(3):
        (folder / f"{number}.jpg").symlink_to("../a.jpg")
    rows = [f'{{"file_name": "{number}.jpg", "caption": "A thing."}}' for number in range(3)]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    said = refused(run(folder, "--workers", 1, output=tmp_path / "other"))
    assert "3 link_out_of_folder (first: 0.jpg); give --follow-links to follow such links" in said
    code, said = run(folder, "--workers", 1, "--follow-links")
    assert code == 0 and said.startswith("3 records of 3 samples")


@pytest.mark.parametrize("limit_s, is_logged", [(0.04, True), (60, False)])
def test_sample_that_takes_long_is_logged(run, tmp_path, monkeypatch, caplog, make_tar, make_image, limit_s, is_logged):
    def slow(sample, rules):
        time.sleep(0.2 * (sample.key == "b"))
        return filters.check(sample, rules)

    monkeypatch.setattr(worker, "SlowSampleLog", partial(SlowSampleLog, limit_s))
    monkeypatch.setattr(worker, "check", slow)
    samples = {key: {"jpg": make_image()} | GOOD for key in "abc"}
    assert run(make_tar(tmp_path / "a.tar", samples), "--workers", 1)[0] == 0
    logged = [record.getMessage() for record in caplog.records if "prepare has been at" in record.getMessage()]
    assert any(f"b of {tmp_path}/a.tar" in line for line in logged) == is_logged
