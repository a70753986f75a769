"""Contact sheets show the exact pixels, counts and texts of records and batches."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from aimv2_jax.data import pipeline
from aimv2_jax.data.dataset_info import DatasetInfo, write_dataset
from aimv2_jax.data.dataset_stats import DatasetStats
from aimv2_jax.data.inspect import sheet
from aimv2_jax.data.inspect.__main__ import main
from aimv2_jax.data.inspect.batch import batch_sheet, row_image
from aimv2_jax.data.inspect.dataset import dataset_sheet
from aimv2_jax.data.records import decode
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms.decode import decode_image
from aimv2_jax.data.transforms.geometry import patchify, unpatchify
from aimv2_jax.plotting import class_colours
from tests.helpers.datasets import encoded

QUICKSTART = str(Path(__file__).parents[2] / "experiments/quickstart.py")
SAMPLE = "package:data/sample"


def text_items(figure):
    return [*figure.texts, *(item for axes in figure.axes for item in axes.texts)]


def texts(figure):
    return [item.get_text() for item in text_items(figure)]


def words(figure):
    return " ".join(" ".join(texts(figure)).split())


def images(figure):
    return [np.asarray(image.get_array()) for image in figure.images]


def charts(figure):
    return [chart for axes in figure.axes for chart in axes.child_axes]


def chart(figure, title):
    [axes] = [axes for axes in charts(figure) if axes.get_title(loc="left").startswith(title)]
    return axes


def saved(figure, path):
    figure.savefig(path, format="png")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def assert_nothing_overlaps(figure):
    """No text overlaps another text, an image or the edge of the sheet."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [item.get_window_extent(renderer) for item in text_items(figure)]
    boxes += [axes.get_tightbbox(renderer) for axes in charts(figure)]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    for image in figure.images:
        rows, columns = image.get_array().shape[:2]
        boxes.append(box.from_bounds(image.ox, image.oy, columns, rows))
    for one, other in itertools.combinations(boxes, 2):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        down = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(across, down) < 1.5, (one, other)  # Letters with descenders may touch the next line's box.


@pytest.fixture(scope="module")
def config(make_config):
    return make_config(data__batch_size=6)


def test_batch_sheet_shows_rows_of_step(config, tokenizer, tmp_path):
    """The batch sheet of a step shows its rows pixel for pixel, with their number, source and text."""
    figure = batch_sheet(config, "some.py", 3, 4)
    with pipeline.training_batches(config, range, 3, tokenizer) as batches:
        arrays = next(batches).arrays
    shown, sheet = images(figure), saved(figure, tmp_path / "sheet.png")
    assert len(shown) == 4
    for row, (placed, image) in enumerate(zip(figure.images, shown)):
        pixels = unpatchify(arrays["patches"][row], (2, 2), 14)
        np.testing.assert_array_equal(image, pixels.repeat(8, 0).repeat(8, 1))
        top = len(sheet) - placed.oy - 224
        np.testing.assert_array_equal(sheet[top : top + 224, placed.ox : placed.ox + 224], image)
    assert [text for text in texts(figure) if text.startswith("example ")] == [f"example {n}" for n in range(18, 22)]
    assert "Rows 0 to 3 of 6, as the model gets them, every pixel drawn as 8 × 8" in words(figure)
    assert "tokens, no more fit" in words(figure)
    assert "some.py, step 3" in texts(figure) and "examples 18 to 23" in texts(figure)
    for row in range(4):
        source = list(config.data.sources)[arrays["source"][row]]
        assert any(text in (f"{source} · alt", f"{source} · synthetic") for text in texts(figure))
        assert f"2 × 2 patches · {arrays['token_valid'][row].sum()} tokens" in words(figure)
        assert tokenizer.decode(arrays["tokens"][row]) in words(figure)


def test_batch_sheet_when_counts_are_drawn_then_those_of_the_batch(config, tokenizer):
    figure = batch_sheet(config, "some.py", 0, 1)
    with pipeline.training_batches(config, range, 0, tokenizer) as batches:
        arrays = next(batches).arrays
    counts = np.bincount(arrays["source"], minlength=2)
    assert {f"{name}: {count}" for name, count in zip(config.data.sources, counts)} <= set(texts(figure))
    for title, name in (("Tokens a row", "token_valid"), ("Patches a row", "valid")):
        bars = chart(figure, title).patches
        lengths = arrays[name].sum(axis=1)
        wanted = np.bincount(lengths - lengths.min())
        assert [bar.get_height() for bar in bars] == wanted.tolist()


def test_batch_sheet_when_a_record_is_unusable_then_named_beside_its_replacement(make_config, make_dataset, datasets):
    bad = make_dataset("bad", 4, {1: {"image": b"no image"}})
    mixture = {"bad": {"alt": 0.5}, "blue": {"alt": 0.5}}
    config = make_config({"bad": bad, "blue": datasets["blue"]}, mixture, data__batch_size=8)
    figure = batch_sheet(config, "some.py", 0, 8)
    assert "in place of" in texts(figure) and "bad/1: undecodable_image" in words(figure)
    assert "undecodable_image: 1" in texts(figure)


def test_batch_sheet_when_the_config_has_workers_then_none_is_started(make_config, monkeypatch):
    configs = []
    real = pipeline.training_batches
    monkeypatch.setattr(
        pipeline,
        "training_batches",
        lambda config, *args, **named: configs.append(config) or real(config, *args, **named),
    )
    batch_sheet(make_config(data__workers=4), "some.py", 0, 1)
    assert [config.data.workers for config in configs] == [0]


def test_batch_sheet_when_the_batch_is_large_then_few_rows_are_read_and_that_is_said(make_config, monkeypatch):
    monkeypatch.setattr("aimv2_jax.data.inspect.batch.MAX_ROWS", 5)
    figure = batch_sheet(make_config(data__batch_size=10_000), "some.py", 2, 7)
    assert len(figure.images) == 5
    assert "Rows 0 to 4 of 10,000" in words(figure) and "Counts are of the first 5 rows" in words(figure)
    assert "example 20,000" in texts(figure)


def test_row_image_grids_differ_by_row():
    """The image of each row is its own even if the grids differ by row."""
    rng = np.random.default_rng(0)
    for grid in ((2, 3), (3, 1), (1, 1)):
        pixels = rng.integers(0, 256, (grid[0] * 4, grid[1] * 4, 3), np.uint8)
        count = grid[0] * grid[1]
        patches = rng.integers(0, 256, (8, 48), np.uint8)  # The patches after the valid ones are arbitrary.
        coords = rng.integers(0, 9, (8, 2)).astype(np.int32)
        order = rng.permutation(count)
        patches[:count] = patchify(pixels, 4)[order]
        coords[:count] = np.indices(grid).reshape(2, -1).T[order]
        np.testing.assert_array_equal(row_image(patches, coords, np.arange(8) < count, 4), pixels)


def test_dataset_sheet_shows_records(datasets):
    """A dataset sheet shows records from the first to the last, with their captions and labels."""
    source = Source("red", datasets["red"])
    figure = dataset_sheet(source, "data/red", 4)
    for index, image in zip((0, 4, 8, 12), images(figure)):
        record = decode(source.read(index))
        pixels = np.asarray(decode_image(record.image))
        np.testing.assert_array_equal(image, sheet.magnified(pixels, 224 // max(pixels.shape)))
        assert record.key in texts(figure)
        assert record.captions["alt"] in texts(figure) and record.captions["synthetic"] in words(figure)
        assert f"number = {index}" in texts(figure)
        assert f"{pixels.shape[1]} × {pixels.shape[0]} · " in words(figure)
    assert len(figure.images) == 4
    assert "13 in 3 shards" in words(figure) and "alt: 13 (100 %)" in texts(figure)


def test_dataset_sheet_shows_several_captions_of_a_kind(make_dataset):
    several = [f"Caption number {n}." for n in range(1, 5)]
    folder = make_dataset("red", 2, {1: {"captions": {"alt": "One.", "synthetic": several}}})
    figure = dataset_sheet(Source("red", folder), "red", 2)
    assert {"alt: 2 (100 %)", "synthetic: 2 (100 %), 5 captions"} <= set(texts(figure))
    assert {"synthetic, 1 of 4", "synthetic, 3 of 4", *several[:3]} <= set(texts(figure))
    assert several[3] not in texts(figure)
    assert_nothing_overlaps(figure)


def test_dataset_sheet_draws_second_images(make_dataset):
    """Masks and depth maps are to the right of their image, pixel by pixel; one that is damaged is named."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 56, 3), np.uint8)
    mask = rng.integers(0, 5, (32, 56), np.uint8)
    depth = rng.integers(0, 9000, (32, 56)).astype(np.uint16)
    fields = {"image": encoded(image), "images": {"depth": encoded(depth), "mask": encoded(mask)}}
    damaged = fields | {"images": {"mask": encoded(image)}}
    large = {"image": encoded(np.zeros((300, 450, 3), np.uint8))}
    large["images"] = {"mask": encoded((np.indices((300, 450))[1] // 225).astype(np.uint8))}
    folder = make_dataset("maps", 3, {0: fields, 1: damaged, 2: large})
    figure = dataset_sheet(Source("maps", folder), "maps", 3)
    [both, alone, reduced] = images(figure)
    assert both.shape == (32 * 4, 3 * 56 * 4 + 2 * 4, 3)
    colours = class_colours()
    np.testing.assert_array_equal(both[:, : 56 * 4], sheet.magnified(image, 4))
    np.testing.assert_array_equal(both[:, -56 * 4 :], sheet.magnified(colours[mask], 4))
    shown = both[::4, 56 * 4 + 4 : 2 * 56 * 4 + 4 : 4].astype(int)
    assert (shown[depth == 0] == 128).all()
    order = np.argsort(depth[depth > 0], kind="stable")
    brightness = shown[depth > 0].sum(-1)[order]
    assert (np.diff(brightness[::50]) <= 0).all() and brightness[0] > 600 > 100 > brightness[-1]
    assert alone.shape == (32 * 4, 56 * 4, 3) and "mask: map_with_colours" in texts(figure)
    assert reduced.shape == (149, 2 * 224 + 4, 3)
    np.testing.assert_array_equal(reduced[:, 228:340], np.broadcast_to(colours[0], (149, 112, 3)))
    np.testing.assert_array_equal(reduced[:, 340:], np.broadcast_to(colours[1], (149, 112, 3)))
    assert f"depth: 16 bits, values from {depth.min()} to {depth.max()}" in texts(figure)
    assert_nothing_overlaps(figure)


def test_dataset_sheet_unusable_records(make_dataset):
    """A dataset sheet shows, in place of the image of an unusable record, the reason."""
    changes = {0: {"image": b""}, 2: {"image": b"junk", "key": "the/bad one"}}
    folder = Path(make_dataset("bad", 4, changes, shard_bytes=1))
    index = folder / "records.index"
    index.write_bytes(index.read_bytes()[:-4] + bytes(4))  # Record 3 would end before it begins.
    figure = dataset_sheet(Source("bad", str(folder)), "bad", 9)
    assert len(figure.images) == 1
    assert {"empty_image", "undecodable_image", "unreadable_record", "the/bad one", "record 3"} <= set(texts(figure))
    assert "3 of these cannot be used" in words(figure)
    assert_nothing_overlaps(figure)


def test_sheet_layout_long_texts_and_odd_images(make_dataset, encoded_image):
    """Nothing on a sheet overlaps even if texts are long and images are of odd sizes."""
    long = {
        "alt": "日本語の説明 " * 40,
        "other kind of a rather long name for a kind": "word " * 300,
        "third": "x" * 9000,
    }
    changes = {
        0: {"captions": long, "key": "folder/" * 40},
        1: {"image": encoded_image(2000, 3)},
        2: {"image": encoded_image(1, 1), "labels": {f"label{i}": "a value " * 9 for i in range(30)}, "captions": {}},
        3: {"image": encoded_image(500, 700)},
    }
    for count in (1, 2, 7):
        figure = dataset_sheet(Source("odd", make_dataset("odd", 7, changes)), "a/long/path" * 30, count)
        assert_nothing_overlaps(figure)
        assert all(max(image.shape) <= 224 for image in images(figure))


def test_captions_in_any_script_are_drawn(make_dataset, tmp_path):
    """A sheet of captions in any script, with dollar signs and control characters is written without a warning."""
    captions = {
        "dollars": "$x^2$ costs \\frac{1}{0} $5",
        "right to left": "שלום עולם, مرحبا بالعالم",
        "Asian": "日本語の説明。" * 30 + "สวัสดีชาวโลก नमस्ते दुनिया 한국어",
        "symbols": "😀 🇩🇪 ∮ ⟷ ﷽ ꧅ \u200b \x07 \ue000 \U0010ffff e\u0301\u0301",
    }
    folder = make_dataset("any", 1, {0: {"captions": captions, "key": "".join(captions.values())[:400]}})
    figure = dataset_sheet(Source("any", folder), "any", 1)
    saved(figure, tmp_path / "sheet.png")
    assert "$x^2$ costs \\frac{1}{0} $5" in texts(figure)
    assert any(text.endswith(" …") for text in texts(figure))
    assert_nothing_overlaps(figure)


@pytest.fixture
def encoded_image():
    from tests.helpers.datasets import encoded

    return lambda width, height: encoded(np.full((height, width, 3), 99, np.uint8))


def test_dataset_sheet_size_bars_sum_to_images(datasets):
    """The bars of the size charts add up to the number of images."""
    figure = dataset_sheet(Source("red", datasets["red"]), "red", 13)
    for title in ("Shorter side", "Aspect"):
        assert sum(bar.get_height() for bar in chart(figure, title).patches) == 13


def test_dataset_sheet_with_prepare_stats(tmp_path, make_record):
    """The sheet of a dataset with statistics of its preparation shows its drops and the sizes of all records."""
    stats, folder = DatasetStats(), tmp_path / "red"
    info = write_dataset(folder, (make_record("red", i) for i in range(9)))
    for _ in range(9):
        stats.keep({"alt": ""}, {}, (900, 600))
    stats.drop("too_small", "tiny one")
    stats.lose("damaged_header", 4, 5000, None)
    (folder / "dataset.json").write_text(DatasetInfo.from_stats(stats, info.shards, info.index_crc32, {}).to_json())
    figure = dataset_sheet(Source("red", str(folder)), "red", 2)
    assert {"14 samples, 5 dropped or lost", "too_small: 1 (first: tiny one)", "damaged_header: 4, 5 kB"} <= set(
        texts(figure)
    )
    for title, label in (("Shorter side, all records", "512–767"), ("Aspect, all records", "1.4")):
        axes = chart(figure, title)
        assert [bar.get_height() for bar in axes.patches] == [9]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [label]


def test_main_checks_the_index(make_dataset, tmp_path, monkeypatch):
    """The sheet of a dataset says whether its index fits its shards, and which shard it does not fit."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    folder = Path(make_dataset("red", 7, shard_bytes=1))
    index, shard, info = folder / "records.index", folder / "00004.bag", folder / "dataset.json"
    good = {path: path.read_bytes() for path in (index, shard, info)}
    other_crc32 = good[info].replace(b'"index_crc32": ', b'"index_crc32": 1')
    for words_of_index, damage in {
        "that of all shards": {},
        "has other ends than 00002.bag": {index: good[index][:8] + b"\1" + good[index][9:]},
        "00004.bag does not end with the ends of 1 records": {shard: good[shard][:-1] + b"\1"},
        "has another CRC-32 than dataset.json": {info: other_crc32},
    }.items():
        for path, data in (good | damage).items():
            path.write_bytes(data)
        assert main([str(folder), "--output", str(tmp_path / "a.png")]) == 0
        assert words_of_index in words(drawn[-1])


def test_main_when_given_a_set_then_a_png_of_the_size_that_its_tiles_need(tmp_path, capsys):
    for number, (count, columns, rows) in enumerate([(1, 1, 1), (24, 6, 4)]):
        output = tmp_path / f"{number}.png"
        assert main([f"{SAMPLE}/train/photo", "--output", str(output), "--max-images", str(count)]) == 0
        assert capsys.readouterr().out == f"{output}\n"
        with Image.open(output) as image:
            assert image.format == "PNG" and image.width == 15 + columns * (208 + 16) + 16 + 330 + 15
            assert image.height >= 76 + rows * 104


def test_main_when_given_a_config_with_overrides_then_their_batch_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    flags = ["--config.data.batch_size=3", "--config.seed", "5", "--step", "7", "--output", str(tmp_path / "a.PNG")]
    assert main([QUICKSTART, *flags]) == 0
    [figure] = drawn
    assert "Rows 0 to 2 of 3" in words(figure) and "example 21" in texts(figure)
    assert_nothing_overlaps(figure)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "no such folder or file: '/nowhere'"),
        (["{tmp}"], "neither a prepared dataset nor a config: the folder has no dataset.json"),
        ([f"{SAMPLE}/train"], "Give one of the datasets in it: other, photo"),
        (["{tmp}/several"], r"Give one of the datasets in it: \x1b[31mred\n"),
        (["{tmp}/notes.txt"], "neither a prepared dataset nor a config"),
        (["{tmp}/empty.py"], "the file has no get_config()"),
        ([QUICKSTART, "--config.data.bath_size=3"], "unknown config key"),
        ([QUICKSTART, "--step", "-1"], "--step is below zero: -1"),
        ([QUICKSTART, "--step", "9" * 20], "--step is too large"),
        ([QUICKSTART, "--config.tokenizer.path=none"], "config tokenizer.path: no such file"),
        ([f"{SAMPLE}/train/photo", "--step", "1"], "are for a config"),
        ([f"{SAMPLE}/train/photo", "--output", "{tmp}/none/a.png"], "--output: no such folder"),
        ([f"{SAMPLE}/train/photo", "--output", "{tmp}/a.jpg"], "does not end in .png"),
        ([f"{SAMPLE}/train/photo", "--output", "{tmp}/folder.png"], "--output is a folder"),
        (["{tmp}/void"], "the dataset: the dataset has no records"),
    ],
)
def test_main_user_errors(tmp_path, capsys, arguments, message):
    """An error that the user can fix gives one line and exit code 2."""
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty.py").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "void").mkdir()
    (tmp_path / "void/dataset.json").write_text(DatasetInfo.from_stats(DatasetStats(), [], 0, made={}).to_json())
    (tmp_path / "several/\x1b[31mred\n").mkdir(parents=True)
    (tmp_path / "several/\x1b[31mred\n/dataset.json").touch()
    default = [] if "--output" in arguments else ["--output", str(tmp_path / "sheet.png")]
    assert main([word.replace("{tmp}", str(tmp_path)) for word in arguments] + default) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), ([], 2), (["x", "--output", "a.png", "--max-images", "201"], 2), (["x", "--step", "a"], 2)],
)
def test_main_when_flags_are_wrong_then_code_2_and_help_is_0(arguments, code, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code
    assert "help" in "".join(capsys.readouterr())
