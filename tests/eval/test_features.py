"""Dense features on disk."""

import re

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from aimv2_jax import load_encoder
from aimv2_jax.errors import UserError
from aimv2_jax.eval import features
from tests.helpers.trained_run import disc_image


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images, one of them in a subfolder, and a text file."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for number in range(5):
        Image.fromarray(disc_image(number)[0]).save(folder / ("below" if number == 4 else ".") / f"{number}.png")
    (folder / "notes.txt").write_text("none")
    return folder


def test_features_of_folder(workdir, photos, tmp_path):
    """A folder gives one file per image with the features that load_encoder returns."""
    arguments = [f"--checkpoint={workdir}", f"--input={photos}", "--batch-size=2"]
    assert features.main([*arguments, f"--output={tmp_path}/out", f"--pca={tmp_path}/pca.png"]) == 0
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.npz"))
    assert written == ["0.npz", "1.npz", "2.npz", "3.npz", "below/4.npz"]
    expected = load_encoder(workdir)([disc_image(number)[0] for number in range(5)])
    for name, image_features in zip(written, expected):
        file = np.load(tmp_path / "out" / name)
        assert file["features"].shape == (4, 4, 32) and file["layer"] == -1
        scale = np.abs(image_features).max()
        np.testing.assert_allclose(file["features"].reshape(16, 32), image_features, rtol=0, atol=1e-6 * scale)
    with Image.open(tmp_path / "pca.png") as drawn:
        assert drawn.size[0] > 100


def test_features_of_a_dataset_in_one_file(workdir, config, tmp_path):
    """Features of a dataset are written to one file as records that name their keys, shapes and layer."""
    file = tmp_path / "features.array_record"
    arguments = [f"--checkpoint={workdir}", f"--input={config.eval.sources['round']}", f"--output={file}"]
    assert features.main([*arguments, "--layer=1", "--image-size=48"]) == 0
    reader = ArrayRecordReader(str(file))
    records = [msgpack.unpackb(record) for record in reader.read_all()]
    assert [record["name"] for record in records] == ["disc/20", "disc/21", "disc/22"]
    assert {(tuple(r["shape"]), r["dtype"], r["layer"]) for r in records} == {((6, 6, 32), "float32", 1)}
    encoder = load_encoder(workdir, image_size=48)
    [(batch, _)] = encoder.batches([disc_image(number)[0] for number in (20, 21, 22)])
    expected = np.asarray(encoder.features(**batch, layer=1))[:3]
    arrays = np.stack([np.frombuffer(record["features"], np.float32).reshape(36, 32) for record in records])
    np.testing.assert_allclose(arrays, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_features_names_differ_by_suffix(workdir, tmp_path):
    """The features of two images whose names differ only by the suffix are both written."""
    (tmp_path / "photos").mkdir()
    for ending in ("png", "bmp"):
        Image.fromarray(disc_image(0)[0]).save(tmp_path / f"photos/a.{ending}")
    assert features.main([f"--checkpoint={workdir}", f"--input={tmp_path}/photos", f"--output={tmp_path}/out"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.bmp.npz", "a.png.npz"]


def test_records_whose_keys_name_no_file_are_refused(tmp_path):
    write = features._FolderWriter(tmp_path / "new")
    write("b.npz/c", np.zeros((1, 1, 1)), None)
    write("a", np.zeros((1, 1, 1)), None)
    wrong = {"../out": "leads out of --output", "/out": "leads out of --output", "a\0b": "not a valid file name"}
    wrong |= {
        "x" * 300: "not a valid file name",
        "": "not a valid file name",
        "a": "the same name",
        "a.npz/b": "the same name",
        "b": "the same name",
    }
    for key, sentence in wrong.items():
        with pytest.raises(UserError, match=sentence):
            write(key, np.zeros((1, 1, 1)), None)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.npz", "b.npz", "c.npz", "new"]


def test_principal_colors_of_three_directions():
    """Each colour channel shows one of the three main directions of the patches."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(8, 8)))[0][:3]
    weights = rng.uniform(-1, 1, (2, 5, 4, 3)) * (9, 3, 1)
    maps = [coordinates @ axes for coordinates in weights.astype(np.float32)]
    colors = np.stack(features.principal_colors(maps)).reshape(-1, 3)
    for channel in range(3):
        component = weights.reshape(-1, 3)[:, channel]
        assert abs(np.corrcoef(colors[:, channel].astype(float), component)[0, 1]) > 0.95


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--input={photos}/none", "--output={new}"], "--input: no such folder"),
        (["--input={empty}", "--output={new}"], "--input: no images in this folder.*jpg"),
        (["--input={photos}", "--output={photos}"], "--output is not empty"),
        (["--input={photos}", "--output={new}", "--layer=3"], "--layer is out of range: 3. Give 0 to 2"),
        (["--input={photos}", "--output={new}", "--area=9"], "sin-cos"),
        (["--input={photos}", "--output={new}", "--pca=x.jpg"], "--pca: the name does not end in .png"),
    ],
)
def test_features_command_user_errors(workdir, photos, tmp_path, capsys, arguments, sentence):
    """A command that cannot work ends with one line and code 2."""
    (tmp_path / "empty").mkdir()
    paths = {"photos": photos, "new": tmp_path / "new", "empty": tmp_path / "empty"}
    assert features.main([f"--checkpoint={workdir}", *(argument.format(**paths) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error) and len(error.strip().splitlines()) == 1
