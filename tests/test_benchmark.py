"""tests/benchmark.py: what it compares, what it refuses to compare, and that every row runs."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import benchmark


def run(seconds, output, gigabytes=None):
    return benchmark.Run(seconds, gigabytes, torch.as_tensor(output))


def test_medians_and_ratio():
    """Of the rounds after the warm-up, whose time counts for nothing; the larger peak counts."""
    ours = iter([run(99.0, [1.0]), *(run(s, [1.0], gb) for s, gb in ((1.0, 3.0), (5.0, 4.0), (2.0, 1.0)))])
    theirs = iter([run(0.1, [1.0]), *(run(s, [1.0], 2.0) for s in (4.0, 3.0, 8.0))])
    result = benchmark.compare("dit", lambda: next(ours), lambda: next(theirs), 3, 1e-4)
    assert (result.ours, result.theirs, result.ratio) == (2.0, 4.0, 0.5)
    assert (result.ours_gb, result.theirs_gb, result.target, result.met) == (4.0, 2.0, 0.85, True)
    assert result.ours_rounds == (1.0, 5.0, 2.0)
    cells = result.line().split()
    assert cells[:2] == ["dit", "2.000"] and "0.500" in cells and "met" in cells


@pytest.mark.parametrize("theirs", [[1.0, 2.001], [1.0, float("nan")], [1.0, 2.0, 3.0]])
def test_different_outputs_are_not_compared(theirs):
    calls = []
    with pytest.raises(ValueError, match="outputs differ"):
        benchmark.compare("dit", lambda: calls.append(1) or run(1.0, [1.0, 2.0]), lambda: run(2.0, theirs), 3, 1e-4)
    assert len(calls) == 1                                              # none is timed


def test_every_row_at_tiny_size(tmp_path, capsys):
    """The two sides agree, the table has a line for each row, and the file holds what the table says."""
    benchmark.main(["--tiny", "--rounds", "1", "--json", str(tmp_path / "result.json")])
    lines = capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "result.json").read_text())
    names = [row["row"] for row in written["rows"]]
    assert names == ["dit", "vae-image", "vae-clip", "mllm", "load", "load memory", "edit"]
    for row, line in zip(written["rows"], lines[1:]):
        assert line.startswith(row["row"]) and f"{row['ratio']:.3f}" in line and f"{row['ours']:.3f}" in line
        assert row["ratio"] == row["ours"] / row["theirs"] if row["row"] != "load memory" else row["ratio"] > 0
        assert row["difference"] <= (1e-3 if row["row"] == "edit" else 1e-4)
    assert written["device"] == "cpu" and [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_row_for_a_gpu_at_tiny_size(tmp_path):
    setting = benchmark.Setting(benchmark.TINY, tmp_path, rounds=1)
    dits = benchmark.dits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "dits", lambda folder, s: dits(folder, benchmark.replace(s, compile=False)))
        [result] = benchmark.blocks(setting)
    assert result.difference < 0.1 and "TFLOP/s" in result.note


@pytest.mark.parametrize("arguments, said", [
    (["speed"], "no row speed"), (["blocks"], "for a GPU"), (["dit", "--rounds", "0"], "1 or more")])
def test_bad_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err
