"""make.py: parts in their order, what was killed goes on, and all of them in a miniature."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from signal import SIG_DFL, SIGHUP, SIGINT, SIGTERM, getsignal, signal

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

    def __init__(self, mark, seconds, code):
        self.mark, self.name, self.left, self.code = mark, mark.name, seconds, code
        self.terminated = False

    def poll(self):
        self.left -= 1
        if self.left > 0:
            return None
        if not self.code:
            self.mark.touch()
        return self.code

    def terminate(self):
        self.terminated = True

    def wait(self, timeout):
        return 0

    def kill(self):
        pass


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(codes, goal) -> (exit code, [what ran beside what], processes); all takes no time."""

    def go(codes=(), goal=None):
        processes, beside = [], []

        def start(out, name, lock):
            alive = [p.name for p in processes if p.left > 0]
            mark = tmp_path / "done" / name
            processes.append(Process(mark, 3 + len(name), dict(codes).get(name, 0)))
            beside.append((name, alive))
            return processes[-1]

        monkeypatch.setattr(make, "start", start)
        monkeypatch.setattr(make.time, "sleep", lambda seconds: None)
        return make.run_all(tmp_path, goal), beside, processes

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
    assert code == 1 and "vision ended with 1; see" in capsys.readouterr().err
    alive = [process for process in processes if process.left > 0]
    assert alive and all(process.terminated for process in alive)
    finished = {name for name, _ in beside} - {"vision"} - {process.name for process in alive}
    code, beside, _ = run()
    assert code == 0 and {name for name, _ in beside} == {*make.PARTS} - finished


def test_a_goal_takes_what_it_needs(run):
    """Half the recipe is a recipe of its own."""
    code, beside, _ = run(goal="score-stage3")
    assert code == 0
    assert {name for name, _ in beside} == {*make.PARTS} - {"more", "longer", "score-longer"}
    assert [name for name, _ in run()[1]] == ["more", "longer", "score-longer"]


def test_a_folder_has_one_run(run, tmp_path, capsys):
    """Two of them once wrote one file of data, with holes that nobody would have noticed."""
    (tmp_path / "logs").mkdir()
    with open(tmp_path / ".lock", "w") as lock:
        make.fcntl.flock(lock, make.fcntl.LOCK_EX)
        assert run()[:2] == (2, []) and "parts run in" in capsys.readouterr().err
    assert run()[0] == 0


def test_a_folder_has_one_recipe(run, monkeypatch, capsys):
    """A changed setting would hold for some parts alone, and the scores would be of neither."""
    assert run({"stage2": 1})[0] == 1
    monkeypatch.setitem(make.CONFIG, "image_queries", 8)  # of stage1, which is done
    assert run()[:2] == (2, []) and "has stage1 by other settings" in capsys.readouterr().err
    monkeypatch.undo()
    longer = replace(make.PARTS["longer"], steps=9)  # which has not begun
    monkeypatch.setitem(make.PARTS, "longer", longer)
    assert run()[0] == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["dit", "--alone"], "dit needs decoder first"),
        (["bank", "--alone"], "bank is done already"),
        (["--alone"], "needs the name of a part"),
        (["ship"], "has no scores yet"),
    ],
)
def test_parts_out_of_turn(words, said, tmp_path, monkeypatch, capsys):
    """A decoder of the VAE before it was refined took the place of the refined one, for good."""
    monkeypatch.setattr(sys, "argv", ["make.py", *words, "--out", str(tmp_path)])
    (tmp_path / "done").mkdir()
    for name in ("bank", "tokenizer"):
        (tmp_path / "done" / name).touch()
    before = {number: getsignal(number) for number in (SIGHUP, SIGTERM)}
    try:
        code = make.main()
    except SystemExit as ended:
        code = ended.code
    finally:
        for number, handler in before.items():
            signal(number, handler)
    assert code == 2 and said in capsys.readouterr().err


@pytest.fixture
def sleepers(tmp_path):
    """sleepers(program) -> a make.py that runs, whose parts are that program; it prints a word."""
    processes = []

    def go(program):
        (tmp_path / "part.py").write_text(program)
        script = "import sys, make; make.__file__ = sys.argv.pop(1); sys.exit(make.main())"
        process = subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "part.py", "--out", tmp_path],
            env=os.environ | {"PYTHONPATH": str(FOLDER)},
            start_new_session=True,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: [signal(number, SIG_DFL) for number in (SIGTERM, SIGHUP, SIGINT)],
        )
        processes.append(process)
        logs = [tmp_path / "logs" / f"{name}.log" for name in ("tokenizer", "bank")]
        deadline = time.monotonic() + 30
        while not all(log.exists() and log.read_text() for log in logs):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return process

    yield go
    for process in processes:
        process.kill()


@pytest.mark.parametrize("number", [SIGTERM, SIGHUP, SIGINT])
def test_no_part_outlives_the_run(number, sleepers, tmp_path):
    """A closed terminal left trainings behind that nobody saw, and a new run beside them."""
    process = sleepers("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    with open(tmp_path / ".lock") as lock:  # which each part holds, too
        make.fcntl.flock(lock, make.fcntl.LOCK_EX | make.fcntl.LOCK_NB)


def test_a_second_signal_ends_parts_that_do_not_end(sleepers, tmp_path):
    """Whoever asks twice does not want to wait a minute, nor to look for what is left behind."""
    ignoring = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    process = sleepers(ignoring + "print('here', flush=True)\ntime.sleep(60)\n")
    process.send_signal(SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(SIGTERM)
    assert process.wait(30) == 143
    time.sleep(1)
    with open(tmp_path / ".lock") as lock:
        make.fcntl.flock(lock, make.fcntl.LOCK_EX | make.fcntl.LOCK_NB)


def test_minutes_left_follow_the_steps(tmp_path):
    """A line that says an hour for ten hours helps nobody."""
    assert 200 < make.minutes_left(tmp_path, make.needed("score-stage3")) <= 360
    assert 360 < make.minutes_left(tmp_path, make.PARTS) <= 720
    (tmp_path / "stage3").mkdir()
    half = {"step": make.PARTS["stage3"].steps // 2}
    (tmp_path / "stage3" / "metrics.jsonl").write_text(json.dumps(half) + "\n")
    left = make.minutes_left(tmp_path, ["stage3", "score-stage3"])
    expected = make.PARTS["stage3"].minutes / 2 + make.PARTS["score-stage3"].minutes
    assert left == pytest.approx(expected, abs=1)


def test_equal_pictures_share_latents(monkeypatch, tmp_path):
    """What a removal leaves may be the target of another case: such pairs have one new picture."""
    image = np.random.default_rng(0).integers(0, 256, (3, 1, 64, 64, 3), dtype=np.uint8)
    folder, rows = tmp_path / "data" / "pair", []
    folder.mkdir(parents=True)
    for i, source in enumerate(image[:2]):
        for role, frames in (("source", source), ("target", image[2])):
            world.write_frames(frames, folder / f"{i}_{role}", False)
        rows.append({"source": f"{i}_source.png", "target": f"{i}_target.png", "instruction": "x"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["--stage", "2", "--data", folder / "data.jsonl", "--weights", FOLDER]
    line += ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    monkeypatch.setattr(make, "command_line", lambda *_: [*map(str, line)])
    make.encode(tmp_path, ["pair"])
    assert len([*(tmp_path / "cache").rglob("*.safetensors")]) == 3


@pytest.mark.slow
def test_all_parts_in_a_miniature(monkeypatch, tmp_path):
    """From nothing to scores: a part that no longer fits the next would be noticed hours later."""
    for name, value in {"IMAGES": 16, "CLIPS": 4}.items():
        monkeypatch.setattr(pretrain, name, value)
    for name, part in make.PARTS.items():
        monkeypatch.setattr(part, "steps", 2 if part.steps else 0)
    for group in ("DATA", "MORE"):
        sets = getattr(make, group).items()
        few = {name: (share, 9, seed, kinds) for name, (share, _, seed, kinds) in sets}
        monkeypatch.setattr(make, group, few)
    monkeypatch.setattr(make, "HELD_OUT", {"seed-9": (9, 6)})
    for name in make.PARTS:
        assert not make.run_part(tmp_path, name), name
    scores = json.loads((tmp_path / "longer" / "scores-seed-9.json").read_text())
    assert len(scores["cases"]) == 6
    model = InstructX.from_pretrained(tmp_path / "longer" / "weights")
    case = world.sample(3, kind="add")
    assert model.edit(case.source, case.instruction).shape == np.shape(case.source)
    assert model.config.area == 65536 and model.trained
