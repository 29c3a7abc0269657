"""Probes on labelled texts, and the files that these come from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saelab.errors import ConfigError, TextError
from saelab.evals.labelled import read, tasks
from saelab.evals.piece import Piece, Score, beside
from saelab.evals.probing import ProbingConfig, accuracy, dense_probe, f1, outcomes, probing
from saelab.interp.labelled_files import LabelledFile, parse
from saelab.interp.linear_fits import largest_differences, logistic_fit
from saelab.interp.pooled_acts import pooled_acts
from saelab.stats import Interval

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def rivers(tmp_path: Path) -> Path:
    """Texts that mention a river or a city: a tiny model tells them apart by the tokens."""
    path = tmp_path / "places.jsonl"
    lines = [{"text": f"the long {'river' if i % 2 else 'city'} of {i} south", "label": i % 2} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def read_all(path: Path, **fields: str):
    return read(LabelledFile(path=path, **fields), max_texts=100, max_classes=6, seed=0)


def test_jsonl_csv_gzip_and_parquet_read_alike(rivers: Path, tmp_path: Path):
    import pyarrow.json
    import pyarrow.parquet
    from pyarrow import csv

    table = pyarrow.json.read_json(rivers)
    csv.write_csv(table, tmp_path / "places.csv")
    pyarrow.parquet.write_table(table, tmp_path / "places.parquet")
    (tmp_path / "places.jsonl.gz").write_bytes(gzip.compress(rivers.read_bytes()))
    contents = [
        read_all(tmp_path / name)[1:] for name in ("places.jsonl", "places.csv", "places.parquet", "places.jsonl.gz")
    ]
    assert all(content == contents[0] for content in contents)


def test_classes_are_equally_many_and_fields_may_have_other_names(tmp_path: Path):
    path = tmp_path / "emotions.jsonl"
    counts = {"anger": 30, "fear": 12, "joy": 20, "rare": 2}
    lines = [{"emotion": name, "said": f"{name} {i}"} for name, n in counts.items() for i in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    data = read_all(path, text="said", label="emotion")
    assert {label: data.labels.count(label) for label in set(data.labels)} == {"anger": 12, "fear": 12, "joy": 12}
    assert all(text.startswith(label) for text, label in zip(data.texts, data.labels, strict=True))
    made = tasks(data, seed=0)
    assert [task.name.partition(": ")[2] for task in made] == ["anger", "fear", "joy"]
    for task in made:
        assert not set(task.train) & set(task.test)
        for half in (task.train, task.test):
            assert sum(number in task.positive for number in half) == len(half) / 2


def test_a_file_on_the_command_line_names_its_fields():
    assert parse("a/b.csv") == LabelledFile(path=Path("a/b.csv"))
    assert parse("a/b.csv:text=statement,label=truth") == LabelledFile(
        path=Path("a/b.csv"), text="statement", label="truth"
    )
    with pytest.raises(ConfigError, match="sets 'txt'"):
        parse("a/b.csv:txt=statement")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("gone.jsonl", None, "there is no file"),
        ("a.xml", "<a/>", "ends in .xml"),
        ("a.jsonl", '{"text": "x"', "not readable as jsonl"),
        ("a.jsonl", '{"words": "x", "label": 1}\n', "no field 'text'"),
        ("a.jsonl", '{"text": "x", "label": 1}\n' * 9, "fewer than two values of 'label'"),
        ("a.jsonl", '{"text": " ", "label": 1}\n', "entry 1 has no 'text'"),
    ],
)
def test_bad_files_are_refused_with_a_sentence(tmp_path: Path, name: str, content: str | None, sentence: str):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=sentence):
        read_all(tmp_path / name)


def test_means_leave_out_bos_and_padding(tiny_model, identity_sae):
    texts = ["the river", "the long river of the south", "city"]
    means = pooled_acts(tiny_model, texts, [HOOK], position="mean", max_tokens=64, sae=identity_sae, batch_texts=3)
    for i, text in enumerate(texts):
        ids, mask = tiny_model.to_tokens(text)
        acts = tiny_model.capture(ids, [HOOK], mask)[HOOK][0, 1:].float()
        np.testing.assert_allclose(means.acts[HOOK][i], acts.mean(0), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            expected = identity_sae.encode(acts).mean(0)
        np.testing.assert_allclose(means.feature_acts[i], expected, rtol=1e-4, atol=1e-5)
    assert means.n_tokens == sum(len(tiny_model.encode(text)) for text in texts)
    short = pooled_acts(tiny_model, texts, [HOOK], position="mean", max_tokens=1, sae=identity_sae, batch_texts=2)
    assert short.n_tokens == 3


def test_the_telling_column_comes_first():
    rng = np.random.default_rng(0)
    columns, positive = rng.normal(size=(100, 5)), np.arange(100) < 50
    columns[:50, 3] += 4
    columns[:50, 1] -= 2
    assert largest_differences(columns, positive, 2).tolist() == [3, 1]


def test_a_probe_finds_the_boundary_in_the_units_of_its_columns():
    columns = np.concatenate([np.linspace(1000, 1010, 50), np.linspace(1020, 1030, 50)])[:, None]
    positive = np.arange(100) >= 50
    for fit in (logistic_fit, dense_probe):
        probe = fit(columns, positive)
        assert (probe.says(columns) == positive).all()
        assert -probe.bias / probe.direction[0] == pytest.approx(1015, abs=1)


def test_accuracy_and_f1_in_closed_form():
    says, positive = (np.array(x, dtype=bool) for x in ([1, 1, 0, 0, 1], [1, 0, 0, 1, 1]))
    sums = outcomes(says, positive).sum(0, keepdims=True)
    assert accuracy(sums)[0] == pytest.approx(3 / 5)
    assert f1(sums)[0] == pytest.approx(2 * 2 / (3 + 3))
    assert f1(outcomes(np.zeros(3, bool), np.zeros(3, bool)).sum(0, keepdims=True))[0] == 0


def test_probing_tells_texts_apart_and_shuffled_labels_not(tiny_model, identity_sae, rivers: Path, tmp_path: Path):
    lines = [json.loads(line) for line in rivers.read_text().splitlines()]
    chance = tmp_path / "chance.jsonl"
    labels = np.random.default_rng(1).permutation([line["label"] for line in lines])
    chance.write_text(
        "".join(json.dumps(line | {"label": int(new)}) + "\n" for line, new in zip(lines, labels, strict=True))
    )
    config = ProbingConfig(data=(LabelledFile(path=rivers), LabelledFile(path=chance)), ks=(1, 5))
    piece = probing(identity_sae, tiny_model, config, draws=50, seed=0)
    value = {(score.metric, score.label): score.interval.value for score in piece.scores}
    names = [file.name for file in config.data]
    assert value["probe_accuracy", f"{names[0]}: SAE features, k = 5"] >= 0.8
    assert value["probe_accuracy", f"{names[0]}: all coordinates"] >= 0.9
    assert value["probe_accuracy", f"{names[1]}: SAE features, k = 5"] <= 0.8
    both = [value["probe_accuracy", f"{name}: SAE features, k = 1"] for name in names]
    assert value["probe_accuracy", "SAE features, k = 1"] == pytest.approx(np.mean(both))


def test_a_number_stands_beside_its_control():
    def piece(value: float, label: str) -> Piece:
        interval = Interval(value, value - 0.1, value + 0.1)
        return Piece(name="probing", scores=(Score("probe_f1", label, interval, 10, "texts"),))

    found = beside(piece(0.9, "a"), piece(0.6, "a")).scores[0]
    assert (found.interval.value, found.control.value) == (0.9, 0.6)
    assert beside(piece(0.9, "a"), piece(0.6, "b")).scores[0].control is None
    assert "No number of the control: why." in beside(piece(0.9, "a"), Piece(name="probing", skipped="why")).notes
    assert Piece.from_json(json.loads(json.dumps(beside(piece(0.9, "a"), piece(0.6, "a")).to_json()))) == beside(
        piece(0.9, "a"), piece(0.6, "a")
    )
