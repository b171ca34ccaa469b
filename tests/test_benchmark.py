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
    """A warm-up that counts, or a mean that one slow round moves, would say less than nothing."""
    ours = [run(99.0, [1.0]), run(1.0, [1.0], 3.0), run(5.0, [1.0], 4.0), run(2.0, [1.0], 1.0)]
    theirs = [run(0.1, [1.0]), run(4.0, [1.0], 2.0), run(3.0, [1.0], 2.0), run(8.0, [1.0], 2.0)]
    ours, theirs = iter(ours), iter(theirs)
    result = benchmark.compare("dit", lambda: next(ours), lambda: next(theirs), 3, 1e-4)
    assert (result.ours, result.theirs, result.ratio) == (2.0, 4.0, 0.5)
    assert (result.ours_gb, result.theirs_gb, result.target, result.met) == (4.0, 2.0, 0.95, True)
    assert result.ours_rounds == (1.0, 5.0, 2.0)
    cells = result.line().split()
    assert cells[:2] == ["dit", "2.000"] and "0.500" in cells and "met" in cells


@pytest.mark.parametrize("theirs", [[1.0, 2.001], [1.0, float("nan")], [1.0, 2.0, 3.0]])
def test_different_outputs_are_not_compared(theirs):
    """The time of another result is no comparison; nothing is timed then."""
    ours = iter([run(1.0, [1.0, 2.0])])
    with pytest.raises(ValueError, match="outputs differ"):
        benchmark.compare("dit", lambda: next(ours), lambda: run(2.0, theirs), 3, 1e-4)


@pytest.mark.slow
def test_every_row_at_tiny_size(tmp_path, capsys):
    """A row that no longer runs, or whose sides differ, would be noticed when it is needed."""
    benchmark.main(["--tiny", "--rounds", "1", "--json", str(tmp_path / "result.json")])
    lines = capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "result.json").read_text())
    names = [row["row"] for row in written["rows"]]
    models = ["dit", "dit-256", "vae-image", "vae-clip", "mllm"]
    assert names == [*models, "load", "load memory", "edit", "train"]
    for row, line in zip(written["rows"], lines[1:]):
        assert line.startswith(row["row"]) and f"{row['ratio']:.3f}" in line
        assert f"{row['ours']:.3f}" in line
        if row["row"] != "load memory":
            assert row["ratio"] == row["ours"] / row["theirs"]
        assert row["difference"] <= (1e-3 if row["row"] == "edit" else 1e-4)
    assert written["device"] == "cpu"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_row_for_a_gpu_at_tiny_size(tmp_path):
    """The row that only a GPU measures must not fail there for another reason than the GPU."""
    [result] = benchmark.blocks("blocks", benchmark.Setting(benchmark.TINY, tmp_path, rounds=1))
    assert result.difference < 0.1 and "TFLOP/s" in result.note


@pytest.mark.parametrize("arguments, message", [
    (["speed"], "no row speed"), (["blocks"], "for a GPU"),
    (["dit", "--rounds", "0"], "1 or more")])
def test_bad_arguments(arguments, message, capsys):
    """A mistyped row must not be measured as nothing, or end in a traceback."""
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err
