"""make.py: parts in their order, what was killed goes on, and all of them in a miniature."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "weights" / "shapes"
sys.path.insert(0, str(FOLDER))

import make
import pretrain
import world

from connector import InstructX


class Process:
    """Stands in for a part's process: ends when the test has counted so many seconds."""

    def __init__(self, name, seconds, code):
        self.name, self.left, self.returncode = name, seconds, code
        self.terminated = False

    def poll(self):
        self.left -= 1
        return None if self.left > 0 else self.returncode

    def terminate(self):
        self.terminated = True

    def wait(self):
        return 0


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(codes) -> (exit code, [what ran beside what], processes); all takes no time."""

    def go(codes=()):
        processes, beside = [], []

        def start(out, name):
            alive = [p.name for p in processes if p.left > 0]
            processes.append(Process(name, 3 + len(name), dict(codes).get(name, 0)))
            beside.append((name, alive))
            return processes[-1]

        monkeypatch.setattr(make, "start", start)
        monkeypatch.setattr(make.time, "sleep", lambda seconds: None)
        return make.run_all(tmp_path), beside, processes

    return go


def test_parts_run_when_what_they_need_is_there(run):
    """Two beside each other at most, the stages alone, and nothing before what it needs."""
    code, beside, _ = run()
    assert code == 0 and sorted(name for name, _ in beside) == sorted(make.PARTS)
    for name, alive in beside:
        before = {other for other, _ in beside[: beside.index((name, alive))]} - {*alive}
        assert {*make.PARTS[name].needs} <= before
        assert sum(make.PARTS[part].cores for part in (name, *alive)) <= 2
    assert any(alive for _, alive in beside)


def test_a_part_that_fails_ends_the_rest_and_the_next_run_goes_on(run, capsys):
    """Hours of a part that runs beside the one that failed should not be lost or run twice."""
    code, beside, processes = run({"vision": 1})
    assert code == 1 and "vision failed" in capsys.readouterr().err
    alive = [process for process in processes if process.left > 0]
    assert alive and all(process.terminated for process in alive)
    finished = {name for name, _ in beside} - {"vision"} - {process.name for process in alive}
    code, beside, _ = run()
    assert code == 0 and {name for name, _ in beside} == {*make.PARTS} - finished


def test_minutes_left_follow_the_steps(tmp_path):
    """A line that says an hour for ten hours helps nobody."""
    everything = make.minutes_left(tmp_path, [*make.PARTS], [])
    assert 200 < everything <= 360
    (tmp_path / "stage3").mkdir()
    half = {"step": make.PARTS["stage3"].steps // 2}
    (tmp_path / "stage3" / "metrics.jsonl").write_text(json.dumps(half) + "\n")
    left = make.minutes_left(tmp_path, ["score-stage3"], ["stage3"])
    expected = make.PARTS["stage3"].minutes / 2 + make.PARTS["score-stage3"].minutes
    assert left == pytest.approx(expected, abs=1)


@pytest.mark.slow
def test_all_parts_in_a_miniature(monkeypatch, tmp_path):
    """From nothing to scores: a part that no longer fits the next would be noticed hours later."""
    for name, value in {"IMAGES": 16, "CLIPS": 4, "PAINTED": {"image": 12, "clip": 4}}.items():
        monkeypatch.setattr(pretrain, name, value)
    for name, part in make.PARTS.items():
        monkeypatch.setattr(part, "steps", 2 if part.steps else 0)
    few = {name: (share, 9, seed, kinds) for name, (share, _, seed, kinds) in make.DATA.items()}
    monkeypatch.setattr(make, "DATA", few)
    monkeypatch.setattr(make, "HELD_OUT", {"seed-9": (9, 6)})
    for name in make.PARTS:
        assert not make.run_part(tmp_path, name), name
    scores = json.loads((tmp_path / "longer" / "scores-seed-9.json").read_text())
    assert len(scores["cases"]) == 6
    model = InstructX.from_pretrained(tmp_path / "longer" / "weights")
    case = world.sample(3, kind="add")
    assert model.edit(case.source, case.instruction).shape == np.shape(case.source)
    assert model.config.area == 65536 and model.trained
