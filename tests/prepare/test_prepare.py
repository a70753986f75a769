"""The prepare command: its datasets, its user errors, and resuming after an interruption."""

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from aimv2_jax.data.dataset_info import DatasetInfo
from aimv2_jax.data.dataset_stats import SampleCount
from aimv2_jax.prepare.__main__ import main
from tests.helpers.full_disk import files_of_at_most
from tests.helpers.preparing import records_of, refused

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tars, run_prepare):
    def run(*flags, given=tars, output="out"):
        """Returns the exit code, the printed text and the output folder."""
        return run_prepare(given, *flags, output=output)

    return run


FLAGS = ["--caption", "alt=json:alt", "short=txt", "--label", "word=json:word", "--shard-size", "30KB"]


def test_prepare_records_and_info(run, tars):
    """The records are the samples in order, and dataset.json describes them."""
    code, said, folder = run(*FLAGS)
    assert code == 0 and said.startswith("60 records of 60 samples in ")
    records = records_of(folder)
    assert [record.key for record in records] == [f"{shard:05d}{i:04d}" for shard in range(6) for i in range(10)]
    assert records[13].captions == {"alt": "Thing 3", "short": "A thing."} and records[13].labels == {"word": "odd"}
    info = DatasetInfo.from_json((folder / "dataset.json").read_text())
    assert (info.records, info.samples, info.kinds, info.labels) == (60, 60, {"alt": 60, "short": 60}, ("word",))
    assert (info.drops, info.changes, info.lost) == ({}, {}, {})
    assert [sum(histogram.counts) for histogram in info.histograms.values()] == [60, 60]
    sizes = [(folder / shard.file).stat().st_size for shard in info.shards]
    assert len(sizes) > 6 and sizes == [shard.bytes for shard in info.shards] and sum(sizes) == info.bytes
    assert {path.name for path in folder.iterdir()} == {
        "dataset.json",
        "records.index",
        *(shard.file for shard in info.shards),
    }
    size = sum(path.stat().st_size for path in tars.iterdir())
    assert info.made["input"] == {"shards": 6, "bytes": size, "first": "00000.tar", "last": "00005.tar"}
    assert info.made["caption"] == {"alt": "json:alt", "short": "txt"} and info.made["shard-size"] == 30_000
    assert str(tars) not in (folder / "dataset.json").read_text()


def test_prepare_when_inputs_are_small_then_several_share_a_shard(run):
    _, said, folder = run("--caption", "alt=json:alt", "--shard-size", "1GB")
    assert "in 1 shards" in said
    assert [path.name for path in folder.glob("*.bag")] == ["00000-00000.bag"]


def test_prepare_when_no_caption_is_named_then_the_usual_one(run):
    _, _, folder = run()
    assert {tuple(record.captions.items()) for record in records_of(folder)} == {(("alt", "A thing."),)}


def test_prepare_bad_samples_counted(run, tmp_path, make_tar, make_image):
    """Bad samples do not affect others, and each is counted with its reason and key."""
    good = {"jpg": make_image(), "txt": b"A thing."}
    samples = {
        "good": good,
        "cmyk": good | {"jpg": make_image(mode="CMYK")},
        "cut": good | {"jpg": make_image()[:-700]},
        "small": good | {"jpg": make_image(20_000, 1)},
        "page": good | {"jpg": b"<html>404</html>"},
        "alone": {"jpg": make_image()},
        "bare": {"txt": b"no image"},
        "latin": good | {"txt": "K\u00e4se".encode("latin-1")},
        "long": good | {"txt": b"word " * 20_000},
        "empty": good | {"txt": b"  "},
    }
    given = tmp_path / "given"
    make_tar(given / "00000.tar", samples)
    damaged = make_tar(given / "00001.tar", {f"d{i}": good for i in range(4)})
    data = bytearray(damaged.read_bytes())
    for member in (b"d1.jpg", b"d1.txt"):
        header = data.index(member)
        data[header : header + 512] = b"\xaa" * 512
    damaged.write_bytes(data)
    (given / "00001_stats.json").write_text(json.dumps({"successes": 4}))
    code, said, folder = run("--caption", "alt=txt", "--decode", given=given)
    assert code == 0
    info = DatasetInfo.from_json((folder / "dataset.json").read_text())
    assert info.drops == {
        "caption_not_text": SampleCount(1, ("latin",)),
        "no_caption": SampleCount(2, ("alone", "empty")),
        "no_image": SampleCount(1, ("bare",)),
        "too_small": SampleCount(1, ("small",)),
        "undecodable_image": SampleCount(2, ("cut", "page")),
    }
    assert info.changes == {"caption_cut": SampleCount(1, ("long",))}
    assert info.lost["damaged_tar"].samples == 1 and info.lost["damaged_tar"].bytes >= 1024
    assert (info.records, info.samples) == (6, 6 + 7 + 1)
    assert [record.key for record in records_of(folder)] == ["good", "cmyk", "long", "d0", "d2", "d3"]
    assert "dropped: 2 undecodable_image (first: cut)" in said and "changed: 1 caption_cut (first: long)" in said


def test_prepare_when_everything_is_bad_then_a_clear_abort_and_nothing_is_left(run):
    said = refused(run("--min-side", 500))
    assert "no usable sample: '60 too_small (first: 000000000)'" in said
    said = refused(run("--keep", "json:word=neither", "--min-side", 500))
    assert "60 not_kept" in said  # A different command works without --resume: no files were left.


def test_prepare_empty_tar(run, tmp_path, make_tar):
    """An empty tar is refused with an error message."""
    refused(run("--caption", "alt=txt", given=make_tar(tmp_path / "none.tar", {})))
    (tmp_path / "nothing.tar").write_bytes(b"")
    refused(run("--caption", "alt=txt", given=tmp_path / "nothing.tar", output="other"))


def test_keep_and_label_when_given_then_only_those(run):
    _, said, _ = run("--keep", "json:word=odd")
    assert "30 records of 60 samples" in said and "dropped: 30 not_kept" in said
    _, said, _ = run("--keep", "json:word=odd", "--keep", "json:word=even", output="both")
    assert "60 records of 60 samples" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--caption", "alt"], "--caption: 'alt' is not of the form NAME=VALUE"),
        (["--caption", "=txt"], "--caption: '=txt' is not of the form"),
        (["--caption", "alt=txt", "alt=txt"], "--caption names a field of 'alt' twice: 'alt=txt'"),
        (["--label", "w=json:word", "--label", "w=txt"], "--label names 'w' twice"),
        (["--caption", "alt=json:missing"], "'json:missing'"),
        (["--label", "w=json:missing"], "'json:missing'"),
        (["--keep", "json:missing=1"], "'json:missing'"),
        (["--verify", "json:missing"], "'json:missing'"),
        (["--keep", "json:word"], "--keep: 'json:word' is not of the form"),
        (["--shard-size", "3XB"], "--shard-size: '3XB' is not a size such as 1GB"),
        (["--shard-size", "-1GB"], "--shard-size"),
        (["--shard-size", "1"], "--shard-size: '1' is below 1000 bytes"),
        (["--shard-size", "4.1GB"], "--shard-size: '4.1GB' is more than 4GB"),
        (["--shard-size", "9" * 400 + ".5 GB"], "is more than 4GB"),
        (["--min-side", "0"], "--min-side: '0' is not a whole number above zero"),
        (["--min-side", "1e3"], "--min-side: '1e3'"),
        (["--max-side", "31"], "--max-side is below --min-side: 31"),
        (["--max-aspect", "0.5"], "--max-aspect: '0.5'"),
        (["--max-aspect", "nan"], "--max-aspect: 'nan'"),
        (["--workers", "0"], "--workers: '0'"),
        (["--runner", "spark"], "--runner: invalid choice: 'spark'"),
        (["--beam-options=--x"], "--beam-options needs Beam: '--x'"),
        (["--runner", "beam", "--workers", "2"], "--workers applies to --runner local only: 2"),
        (["--resum"], "unrecognized arguments: --resum"),
    ],
)
def test_flags_when_wrong_then_one_line_and_nothing_is_made(tmp_path, tars, capsys, flags, says):
    try:
        code = main(["--input", str(tars), "--output", str(tmp_path / "out"), *flags])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err
    assert code == 2 and says in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_when_asked_for_then_it_says_what_a_field_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "json:NAME" in said and "--resume" in said


def test_field_when_only_some_of_the_inputs_have_it_then_used_where_it_is(run, tmp_path, make_tar, make_image):
    for shard, fields in enumerate([{"alt": "Thing"}, {"alt": "Thing", "cls": "a"}, {"cls": "b"}]):
        samples = {f"{shard}{i}": {"jpg": make_image(), "txt": b"A thing.", "json": fields} for i in range(2)}
        make_tar(tmp_path / f"given/{shard}.tar", samples)
    flags = ("--caption", "alt=txt", "other=json:alt", "--label", "cls=json:cls")
    code, said, folder = run(*flags, given=tmp_path / "given")
    assert code == 0 and "captions: alt 6, other 4" in said
    assert [record.labels.get("cls") for record in records_of(folder)] == [None, None, "a", "a", "b", "b"]


def test_prepare_keeps_several_captions_of_a_kind(run, tmp_path, make_tar, make_image):
    texts = ["One.", "Two.", ""]
    samples = {
        str(i): {"jpg": make_image(seed=i), "txt": b"A thing.", "json": {"more": texts[: i + 1], "last": "End."}}
        for i in range(3)
    }
    flags = ["--caption", "alt=txt", "synthetic=json:more", "--caption", "synthetic=json:last"]
    code, said, folder = run(*flags, given=make_tar(tmp_path / "a.tar", samples))
    assert code == 0 and "captions: alt 3, synthetic 8 (of 3 records)\n" in said
    found = [record.captions["synthetic"] for record in records_of(folder)]
    assert found == [["One.", "End."], ["One.", "Two.", "End."], ["One.", "Two.", "End."]]
    info = DatasetInfo.from_json((folder / "dataset.json").read_text())
    assert (info.kinds, info.records_with) == ({"alt": 3, "synthetic": 8}, {"alt": 3, "synthetic": 3})
    assert info.made["caption"] == {"alt": "txt", "synthetic": ["json:more", "json:last"]}
    assert run(*flags, "--resume", given=tmp_path / "a.tar")[0] == 0
    assert "already contains a dataset" in refused(run(*flags[:-2], "--resume", given=tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("asked", "says"),
    [("--caption alt=txt x=json:x", "--caption x=json:x"), ("--caption alt=txt --label x=json:x", "--label x=json:x")],
)
def test_field_when_no_record_has_it_then_refused_with_the_counts(run, tmp_path, make_tar, make_image, asked, says):
    samples = {str(i): {"jpg": make_image(), "txt": b"A thing.", "json": {"x": [["no text"]]}} for i in range(3)}
    said = refused(run(*asked.split(), given=make_tar(tmp_path / "a.tar", samples)))
    assert f"{says}: " in said and "0 of 3 records" in said


def test_workers_without_sched_getaffinity(tmp_path, tars, monkeypatch):
    """If the system does not report the usable CPUs, as many workers start as the machine has CPUs."""
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS does not have it.
    assert main(["--input", str(tars / "00000.tar"), "--output", str(tmp_path / "out")]) == 0


def test_input_missing_or_unreadable(run, tmp_path):
    """An input that is missing or unreadable is refused with an error message that names it."""
    assert "'/nowhere/at.all'" in refused(run(given="/nowhere/at.all"))
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    assert "loop.tar" in refused(run(given=tmp_path / "loop.tar"))


def test_input_fails_midway(run, tars, monkeypatch, files_of):
    """An input that fails midway ends the run with an error message, and --resume completes it."""
    from aimv2_jax.prepare import worker

    read = worker.inputs.read

    def failing(shard, *fields):
        yield from read(shard, *fields)
        if shard.path.endswith("00003.tar"):
            raise OSError(5, "Input/output error", shard.path)

    _, _, straight = run(*FLAGS, output="straight")
    monkeypatch.setattr(worker.inputs, "read", failing)
    said = refused(run(*FLAGS))
    assert "--input cannot be read: Input/output error" in said and "00003.tar" in said and "--resume" in said
    monkeypatch.undo()
    code, _, folder = run(*FLAGS, "--resume")
    assert code == 0 and files_of(folder) == files_of(straight)


def test_parquet_column_missing(run, tmp_path, make_image):
    """A parquet file without the requested column is refused with an error message."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"jpg": [make_image()] * 3, "caption": ["A thing."] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    said = refused(run("--caption", "alt=text", given=tmp_path / "a.parquet"))
    assert "'text'" in said and "caption" in said
    code, said, _ = run("--caption", "alt=caption", given=tmp_path / "a.parquet")
    assert code == 0 and said.startswith("3 records of 3 samples")


def test_output_when_it_holds_something_then_refused_with_the_remedy(run, tmp_path):
    run()
    assert "already contains a dataset" in refused(run())
    assert "already contains a dataset" in refused(run("--min-side", 33, "--resume"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years")
    assert "contains other files" in refused(run(output="home"))
    assert "--output is a file" in refused(run(output="home/thesis.txt"))
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_resume_when_finished_already_then_the_same_answer(run, files_of):
    _, first, folder = run(*FLAGS, "--resume")
    before = files_of(folder)
    code, again, _ = run(*FLAGS, "--resume")
    assert (code, again, files_of(folder)) == (0, first, before)


def test_disk_full(run, tmp_path, tars, make_image, make_tar, files_of):
    """A full disk ends the run with a message of one sentence, and --resume completes the run."""
    given = tmp_path / "given"
    for shard, pairs in enumerate((2, 30)):
        samples = {f"{shard}{i:02d}": {"jpg": make_image(100, 90, seed=i), "txt": b"A thing."} for i in range(pairs)}
        make_tar(given / f"{shard}.tar", samples)
    flags = ("--shard-size", "40KB")
    _, _, straight = run("--shard-size", "40KB", given=given, output="straight")
    with files_of_at_most(32 << 10):
        said = refused(run(*flags, given=given))
    assert re.search(r"--output cannot be used: File too large: '.*/\.parts/\.00001-00000\.bag", said)
    assert "--resume" in said
    folder = tmp_path / "out"
    assert [path.name for path in folder.glob("*.bag")] == ["00000-00000.bag"]  # The first task fits.
    assert not (folder / "dataset.json").exists()
    assert not list((folder / ".parts").glob("*.part"))
    assert "unfinished dataset" in refused(run(*flags, given=given)) and "--resume" in refused(run(*flags, given=given))
    assert "--shard-size is not 40000, with which this work began: 50000" in refused(
        run("--shard-size", "50KB", "--resume", given=given)
    )
    make_tar(given / "2.tar", {"x": {"jpg": make_image(), "txt": b"x"}})
    assert "--input finds other files" in refused(run(*flags, "--resume", given=given))
    (given / "2.tar").unlink()
    code, _, folder = run(*flags, "--resume", given=given)
    assert code == 0 and files_of(folder) == files_of(straight)


def test_output_when_another_run_is_at_it_then_refused_with_and_without_resume(run, tmp_path):
    with files_of_at_most(16 << 10):
        refused(run(*FLAGS))
    with (tmp_path / "out/.parts/lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for flags in (FLAGS, [*FLAGS, "--resume"]):
            assert "--output is in use by another run" in refused(run(*flags))
    assert run(*FLAGS, "--resume")[0] == 0


def start(tars, folder, *flags):
    command = [sys.executable, "-m", "aimv2_jax.prepare", "--input", str(tars), "--output", str(folder), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def many(tmp_path_factory, make_tar, make_image):
    """Input for some seconds of work: 30 tars of 30 pairs, one task per tar."""
    folder = tmp_path_factory.mktemp("many")
    image = make_image(200, 200, quality=60)
    for shard in range(30):
        make_tar(
            folder / f"{shard:05d}.tar", {f"{shard}-{i:03d}": {"jpg": image, "txt": b"A thing."} for i in range(30)}
        )
    return folder


MANY = ("--shard-size", "1MB", "--decode", "--workers", "2")


@pytest.fixture(scope="module")
def straight(many, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "out"
    assert main(["--input", str(many), "--output", str(folder), *MANY[:-2], "--workers", "1"]) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone(pids):
    end = time.monotonic() + 10
    while any(map(runs, pids)):
        assert time.monotonic() < end
        time.sleep(0.05)


def when_under_way(process, folder):
    """Waits until some tasks are finished; returns the processes of the run."""
    end = time.monotonic() + 30
    while len(list((folder / ".parts").glob("0*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    assert not (folder / "dataset.json").exists()
    return [process.pid, *children(process.pid)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_run_killed_midway(many, straight, tmp_path, files_of, how):
    """A killed run leaves whole shards only and no orphan process, and --resume makes the same files."""
    process = start(many, tmp_path / "out", *MANY)
    pids = when_under_way(process, tmp_path / "out")
    assert len(pids) >= 3
    os.kill(process.pid, how)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    assert said == "interrupted\n" or how == signal.SIGKILL
    assert_gone(pids)
    left = sorted((tmp_path / "out").glob("*.bag"))
    assert left and not (tmp_path / "out/dataset.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in left}
    finished = {
        shard["file"]
        for path in (tmp_path / "out/.parts").glob("0*.json")
        for shard in json.loads(path.read_text())["shards"]
    }
    assert len(finished) >= 3
    assert main(["--input", str(many), "--output", str(tmp_path / "out"), *MANY, "--resume"]) == 0
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == {
        name: times[name] for name in finished
    }  # Finished tasks are not run again.
    assert files_of(tmp_path / "out") == straight


def test_run_when_interrupted_in_long_tasks_then_it_does_not_wait_for_them(tmp_path, make_tar, make_image):
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(buffer, "PNG")  # Small to store and slow to decode.
    for shard in range(2):
        samples = {f"{shard}-{i:03d}": {"png": buffer.getvalue(), "txt": b"A thing."} for i in range(500)}
        make_tar(tmp_path / f"given/{shard}.tar", samples)
    process = start(tmp_path / "given", tmp_path / "out", "--shard-size", "1MB", *MANY[2:])
    end = time.monotonic() + 30
    while len(list((tmp_path / "out/.parts").glob(".*.part"))) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    pids = [process.pid, *children(process.pid)]
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate(timeout=15)[1] == "interrupted\n"
    assert_gone(pids)


def test_run_worker_killed(many, tmp_path):
    """If a worker is killed, the run prints an error message and ends with all its processes."""
    process = start(many, tmp_path / "out", *MANY)
    pids = when_under_way(process, tmp_path / "out")
    worker = next(pid for pid in pids[1:] if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    assert said.startswith("error: a worker process died while preparing one of these inputs: '") and "--resume" in said
    assert re.search(r"inputs: '/\S+/000\d\d\.tar; /\S+/000\d\d\.tar'", said)
    assert said.count("\n") == 1
    assert_gone(pids)


def test_resume_when_what_is_finished_is_gone_cut_or_damaged_then_made_again(run, tmp_path, files_of):
    _, _, straight = run(*FLAGS, output="straight")
    with pytest.MonkeyPatch.context() as patch:
        from aimv2_jax.prepare import __main__ as prepare

        patch.setattr(prepare, "_finish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert run(*FLAGS)[0] == 2
    for number, text in enumerate(("", '{"shards": [', "[]", '{"shards": [{}], "stats": {}}')):
        (tmp_path / f"out/.parts/{number + 3:05d}.json").write_text(text)
    (tmp_path / "out/00000-00000.bag").unlink()
    cut = tmp_path / "out/00002-00000.bag"
    cut.write_bytes(cut.read_bytes()[:-1])
    code, _, folder = run(*FLAGS, "--resume")
    assert code == 0 and files_of(folder) == files_of(straight)


def test_resume_finds_shards_that_were_overwritten(run, tmp_path, files_of, monkeypatch):
    """Files of the right size are verified if their modification time changed; unchanged ones are kept."""
    from aimv2_jax.prepare import __main__ as prepare

    _, _, straight = run(*FLAGS, output="straight")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_finish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert run(*FLAGS)[0] == 2
    overwritten, touched = (tmp_path / f"out/0000{number}-00000.bag" for number in (1, 2))
    overwritten.write_bytes(os.urandom(overwritten.stat().st_size))
    os.utime(touched, (1, 1))
    code, _, folder = run(*FLAGS, "--resume")
    assert code == 0 and files_of(folder) == files_of(straight)
    assert touched.stat().st_mtime == 1


def test_runners_when_local_with_one_and_two_workers_and_beam_then_the_same_bytes(run, files_of, tmp_path, tars):
    _, _, one = run(*FLAGS, output="one")
    results = {}
    for name, flags in (("two", ["--workers", "2"]), ("beam", ["--runner", "beam"])):
        folder = tmp_path / name
        assert main(["--input", str(tars), "--output", str(folder), *FLAGS, *flags]) == 0
        results[name] = files_of(folder)
    assert len(files_of(one)) > 6
    assert results["two"] == results["beam"] == files_of(one)


def test_beam_user_error_in_task(tmp_path, tars, capsys):
    """A user error in a Beam task is printed as one line."""
    with files_of_at_most(16 << 10):
        code = main(["--input", str(tars), "--output", str(tmp_path / "out"), *FLAGS, "--runner", "beam"])
    said = capsys.readouterr().err
    assert code == 2 and "error: --output cannot be used: File too large" in said
    assert "--resume" in said


def test_beam_when_not_installed_then_the_extra_is_named(tmp_path, tars, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert main(["--input", str(tars), "--output", str(tmp_path / "out"), "--runner", "beam"]) == 2
    assert "pip install aimv2_jax[beam]" in capsys.readouterr().err


def test_modules_when_imported_by_a_worker_then_no_jax_tensorflow_pyarrow_or_beam():
    heavy = ("jax", "tensorflow", "pyarrow", "apache_beam")
    code = f"import sys, aimv2_jax.prepare; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
