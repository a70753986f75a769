"""The suite's command: what it computes once, how it resumes, and what its table says."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.eval.probes import knn
from aimv2_jax.eval.probes.dataset import read_labelled_dataset
from aimv2_jax.eval.probes.features import FeatureCache
from aimv2_jax.eval.suite import __main__ as suite
from aimv2_jax.eval.suite import evaluate
from aimv2_jax.eval.suite.catalogue import Description, SuiteSet, find_sets
from aimv2_jax.eval.suite.evaluate import PROBES, SetProbes, SuiteModel, best_of_neighbours
from aimv2_jax.pretrained.encoder import load_encoder
from tests.eval.suite.conftest import write_set

QUICK = ["--protocol=quick", "--epochs=4", "--encoder-batch=16", "--batch-size=16", "--no-refit"]


def run(workdir, root, output, *flags):
    return suite.main([f"--checkpoint={workdir}", f"--data={root}", f"--output={output}", *QUICK, *flags])


@pytest.fixture(scope="module")
def finished(workdir, root, tmp_path_factory):
    """A finished suite's folder, and the datasets whose features were computed, in order."""
    output, computed = tmp_path_factory.mktemp("suite"), []
    compute = FeatureCache._compute

    def watched(cache, dataset, title):
        computed.append((dataset.source.name, cache.pooling, cache.flips))
        return compute(cache, dataset, title)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FeatureCache, "_compute", watched)
        assert run(workdir, root, output) == 2  # One set is half there.
    return output, computed


def table_of(output):
    return json.loads((output / "table.json").read_text())


def test_probes_of_a_set_share_one_pass(finished, root):
    """Attentive, linear and k-NN probes of a set read features that are computed once for train and once for test."""
    _, computed = finished
    expected = []
    for name in ("dtd", "discs"):
        expected += [(str(root / name / "train"), "patches", True), (str(root / name / "test"), "patches", False)]
    assert computed == expected


def test_table_has_ours_beside_the_papers(finished):
    """The table has every probe with its interval, the paper's figures, and what is refused, missing and left out."""
    output, _ = finished
    table, text = table_of(output), (output / "table.md").read_text()
    rows = {entry["name"]: entry for entry in table["sets"]}
    assert list(rows) == ["dtd", "pets", "discs"] and table["complete"]
    for name in ("dtd", "discs"):
        assert set(rows[name]["results"]) == {"attentive", "linear", "knn"}
        assert rows[name]["examples"] == {"train": 40, "test": 20, "classes": 3}
        for result in rows[name]["results"].values():
            assert 0 <= result["ci95"][0] <= result["top1"] <= result["ci95"][1] <= 1
    assert rows["dtd"]["paper"] == {"resolution": 224, "L": 87.9, "H": 88.2, "1B": 88.4, "3B": 88.9}
    assert rows["discs"]["paper"] is None and "3 classes (paper: 47)" in rows["dtd"]["notes"]
    [error] = rows["pets"]["errors"]
    assert re.match("refused: the set pets is only half there: test is no prepared dataset", error)
    assert len(table["missing"]) == 12 and table["ignored"] == ["unknown"]
    result = rows["dtd"]["results"]["attentive"]
    cell = f"{100 * result['top1']:.1f} ({100 * result['ci95'][0]:.1f}–{100 * result['ci95'][1]:.1f})"
    assert f"| DTD | 40 / 20 | {cell} |" in text and "| 87.9 | 88.2 | 88.4 | 88.9 | 224 px |" in text
    assert error in text and "12 missing sets" in text and "quick, which is not the paper's" in text
    with Image.open(output / "table.png") as drawn:
        assert drawn.size[0] > 800
    assert not [file for file in output.rglob("*") if ".part" in file.name]


def test_suite_resumes_where_it_was_killed(workdir, root, finished, tmp_path, monkeypatch):
    """After a death in the second set, only what was not finished runs, and the table is that of a whole run."""
    probes = "--probes=linear,knn"
    calls = []
    probes_run = SetProbes.run

    def dying(self, probe):
        calls.append((self.entry.name, probe))
        if calls[-1] == ("discs", "linear"):
            raise SystemError("killed")
        return probes_run(self, probe)

    monkeypatch.setattr(SetProbes, "run", dying)
    with pytest.raises(SystemError, match="killed"):
        run(workdir, root, tmp_path, probes)
    assert [entry["name"] for entry in table_of(tmp_path)["sets"]] == ["dtd", "pets"]
    assert not table_of(tmp_path)["complete"]
    done = list(calls)
    calls.clear()

    def counted(self, probe):
        calls.append((self.entry.name, probe))
        return probes_run(self, probe)

    monkeypatch.setattr(SetProbes, "run", counted)
    assert run(workdir, root, tmp_path, probes) == 2
    assert done == [("dtd", "linear"), ("dtd", "knn"), ("discs", "linear")]
    assert calls == [("discs", "linear"), ("discs", "knn")]
    ours, whole = table_of(tmp_path), table_of(finished[0])
    for mine, theirs in zip(ours["sets"], whole["sets"]):
        for probe, result in mine["results"].items():
            # These means are the encoder's, those of the whole run are of stored patches and rounded otherwise.
            assert result["top1"] == pytest.approx(theirs["results"][probe]["top1"], abs=0.11)
        for key in ("examples", "paper", "errors"):
            assert mine[key] == theirs[key]
    monkeypatch.setattr(SetProbes, "run", lambda *_: pytest.fail("a finished probe ran again"))
    assert run(workdir, root, tmp_path, probes) == 2
    assert table_of(tmp_path) == ours


def test_output_of_another_run_is_refused(workdir, root, finished, capsys):
    """A folder with results of another encoder, or of other settings, is left alone."""
    before = table_of(finished[0])
    assert run(f"{workdir}:40", root, finished[0]) == 2
    assert "--output has results of another encoder" in capsys.readouterr().err
    assert run(workdir, root, finished[0], "--epochs=3") == 2
    assert "--output has results of another settings" in capsys.readouterr().err
    assert table_of(finished[0]) == before


def test_knn_is_dinos(finished, root):
    """Votes of DINO's numbers of neighbours equal those counted one by one, and the best on the test is reported."""
    rng = np.random.default_rng(0)
    train, test, classes = rng.normal(size=(300, 8)), rng.normal(size=(40, 8)), rng.integers(5, size=300)
    votes = knn.vote(train, classes, test, knn.DINO_COUNTS, 5)
    for count, predicted in zip(knn.DINO_COUNTS, votes):
        for row, guess in zip(test, predicted):
            cosine = train @ row / np.linalg.norm(train, axis=1) / np.linalg.norm(row)
            near = np.argsort(-cosine)[:count]
            weights = [np.exp(cosine[near][classes[near] == c] / 0.07).sum() for c in range(5)]
            assert guess == int(np.argmax(weights))
    assert knn.DINO_COUNTS == (10, 20, 100, 200) and knn.TEMPERATURE == 0.07
    dataset = read_labelled_dataset(str(root / "dtd/test"), "--test", "class", None, ())
    wrong = (dataset.classes + 1) % 3
    result = best_of_neighbours(dataset, {10: wrong, 20: dataset.classes, 100: wrong, 200: dataset.classes})
    assert result["top1"] == 1 and result["best"] == {"neighbours": 20}
    assert result["by_neighbours"] == {"10": 0, "20": 1, "100": 0, "200": 1}
    stored = json.loads((finished[0] / "sets/dtd/knn.json").read_text())["result"]
    assert set(stored["by_neighbours"]) == {"10", "20", "100", "200"}


def test_means_of_kept_patches(workdir, root):
    """Means of stored patches equal the means that the encoder computes, up to float16."""
    dataset = read_labelled_dataset(str(root / "dtd/test"), "--test", "class", None, ())
    cache = FeatureCache(None, load_encoder(workdir), "patches", None, True, 16)
    patches = cache(dataset, "test")
    patches.valid[0, 3:] = False
    patches.features[0, :, 3:] = 1e4
    means = patches.means()
    expected = patches.features[0, 1, :3].astype(np.float32).mean(0)
    np.testing.assert_allclose(means.features[0, 1, 0], expected, rtol=1e-3, atol=1e-3)
    pooled = FeatureCache(None, cache.encoder, "mean", None, True, 16)(dataset, "test")
    assert means.features.shape == pooled.features.shape and means.valid.shape == (20, 1)
    np.testing.assert_allclose(
        means.features[1:], pooled.features[1:], rtol=0, atol=4e-3 * np.abs(pooled.features).max()
    )


def test_zeroshot_of_a_set(workdir, root, tmp_path, monkeypatch):
    """Names of classes come from labels or the description; numbers alone are no names."""
    model = SuiteModel(load_encoder(workdir), object())
    asked = []

    def similarities(dual, test, prompts):
        asked.append(prompts)
        return np.eye(len(prompts), dtype=np.float32)[test.classes]

    monkeypatch.setattr(evaluate, "class_similarities", similarities)
    write_set(tmp_path / "numbers", {}, classes=["0", "1", "2"])
    entries = {entry.name: entry for folder in (root, tmp_path) for entry in find_sets(folder).sets}
    config = suite.suite_config(suite.parse_arguments(["--checkpoint=x", "--data=x", "--output=x"]))

    def zeroshot(entry):
        probes = SetProbes(model, entry, entry.read(), config.attentive, config.reference, config.linear)
        return probes.run("zeroshot")

    assert zeroshot(entries["discs"])["top1"] == 1
    assert asked == [[[f"a photo of a {name}."] for name in ("blue", "green", "red")]]
    assert "its labels are numbers" in zeroshot(entries["numbers"])["skipped"]
    classes = tmp_path / "classes.txt"
    classes.write_text("zero\nyellow one, one\ntwo\n")
    numbers = entries["numbers"]
    description = Description(classes=str(classes), templates="simple")
    named = zeroshot(SuiteSet(numbers.name, numbers.folder, description, None))
    assert named["templates"] == 7 and named["examples"]["classes"] == 3
    assert len(asked[-1][1]) == 14 and "itap of a yellow one." in asked[-1][1]


def test_follow_probes_each_checkpoint(workdir, root, tmp_path, monkeypatch, capsys):
    """Each step of a run gets its table, and the figure has them all; a step that was deleted is named."""
    monkeypatch.setattr(suite, "new_steps", lambda workdir, poll_s: iter([20, 30, 40]))
    assert run(workdir, root, tmp_path, "--follow", "--probes=knn") == 2
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert list(steps) == ["20", "40"]
    assert table_of(tmp_path / "40")["sets"] == steps["40"]
    assert {tuple(entry["results"]) for entry in steps["20"] if entry["name"] != "pets"} == {("knn",)}
    with Image.open(tmp_path / "steps.png") as drawn:
        assert drawn.size[0] > 800
    assert f"{workdir}:40" in (tmp_path / "40/table.md").read_text()
    out = capsys.readouterr().out
    assert "step 20\n" in out and "step 30 is not probed: --checkpoint: the run has no such step: 30" in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--probes=knn,svm"], "'svm' is none of attentive, linear, knn, zeroshot"),
        (["--checkpoint=random"], "go together"),
        (["--checkpoint=random", "--like=x", "--follow"], "--follow needs the --workdir of a run"),
        (["--output={root}/dtd/set.txt"], "--output is a file"),
    ],
)
def test_suite_command_user_errors(workdir, root, tmp_path, capsys, flags, sentence):
    """A command that cannot work ends with one line and code 2."""
    (root / "dtd/set.txt").write_text("a file")
    try:
        code = run(workdir, root, tmp_path, *(flag.format(root=root) for flag in flags))
    except SystemExit as error:
        code = error.code
    assert code == 2 and sentence in capsys.readouterr().err
    assert PROBES == ("attentive", "linear", "knn", "zeroshot")
