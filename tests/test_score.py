"""score.py: the names that official scorers read, replies that are kept, and means by hand."""

import csv
import json
import os
import re
import shutil
import statistics
import sys

import numpy as np
import pytest
import score
from PIL import Image

from edit import write_clip

IMGEDIT = {
    "1082": {"id": "animal/1.jpg", "prompt": "Smooth the shell.", "edit_type": "adjust"},
    "22": {"id": "animal/1.jpg", "prompt": "Add a hat.", "edit_type": "add"},
    "23": {"id": "human/2.jpg", "prompt": "Add \u2028 a 帽子.", "edit_type": "add"},
    "7": {"id": "human/2.jpg", "prompt": "Take the man out.", "edit_type": "extract"},
}
IMGEDIT_PROMPTS = {kind: f"Rate {kind}: <edit_prompt>" for kind in ("adjust", "add", "extract")}
VIE_PROMPTS = '''import nowhere
raise SystemExit("this file is data")
_context_no_delimit = """You are an artist."""
_prompts_0shot_two_image_edit_rule = "Two images."
_prompts_0shot_tie_rule_SC = """
Instruction: <instruction>
"""
_prompts_0shot_rule_PQ, other = "a", 1
_prompts_0shot_rule_PQ = """One image."""
'''


def picture(path, seed=0, size=(32, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def clip(path, frames=6, size=(32, 24), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = frames, *size[::-1], 3
    write_clip(path, np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), 8)
    return path


def run(*words):
    """Exit code of a command line."""
    try:
        return score.main(list(map(str, words)))
    except SystemExit as end:
        return end.code


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def fails(capsys, *words):
    """The one line of a command that ends with 2."""
    capsys.readouterr()
    assert run(*words) == 2
    text = capsys.readouterr().err
    assert text.startswith("score.py") and text.count("\n") == 1
    return text


@pytest.fixture
def imgedit(tmp_path):
    """(rows file, results) of four edits; results have another size than the sources."""
    bench = tmp_path / "bench"
    picture(bench / "animal/1.jpg", 1)
    picture(bench / "human/2.jpg", 2)
    (bench / "singleturn.json").write_text(json.dumps(IMGEDIT), encoding="utf-8")
    (bench / "judge_prompt.json").write_text(json.dumps(IMGEDIT_PROMPTS))
    assert run("rows", "imgedit", bench / "singleturn.json", "-o", tmp_path / "rows.jsonl") == 0
    for seed, key in enumerate(IMGEDIT):
        picture(tmp_path / f"results/{key}.png", seed, (40, 40))
    return tmp_path / "rows.jsonl", tmp_path / "results"


@pytest.fixture
def ask(tiny_weights, monkeypatch):
    """judge() of a tiny judge whose replies are short."""
    for benchmark in score.BENCHMARKS.values():
        monkeypatch.setattr(type(benchmark), "max_tokens", 6)

    def judge(rows, results, *prompts, weights=tiny_weights / "mllm"):
        return run("judge", rows, results, "--prompts", *prompts, "--weights", weights)

    return judge


def answer(rows, results, replies):
    """Writes replies {(output, question): text} as `judge` would have, and its settings."""
    settings = {"judge": "J", "weights": "0123456789", "prompts": ["abcdefghij"]}
    settings["rows"] = score.digest(rows.read_bytes())
    (results / "judge.json").write_text(json.dumps(settings))
    with open(results / "replies.jsonl", "w", encoding="utf-8") as file:
        for (output, question), reply in replies.items():
            digest = score.digest((results / output).read_bytes())
            line = {"output": output, "question": question, "reply": reply, "result": digest}
            file.write(json.dumps(line) + "\n")


def table(capsys, rows, results):
    """{label: [cells]} of a table, and its first line."""
    capsys.readouterr()
    assert run("table", rows, results) == 0
    first, *others = capsys.readouterr().out.splitlines()
    return {line[:32].strip(): line[32:].split() for line in others if line.strip()}, first


# Rows.


def test_imgedit_rows_have_the_official_names(imgedit):
    """basic_bench.py reads RESULTS/<key>.png alone: another name is a case that is never scored."""
    rows, _ = imgedit
    found = lines_of(rows)
    assert [row["output"] for row in found] == [f"{key}.png" for key in IMGEDIT]
    for row, raw in zip(found, IMGEDIT.values()):
        assert (row["instruction"], row["kind"]) == (raw["prompt"], raw["edit_type"])
        assert (rows.parent / row["source"]).samefile(rows.parent / "bench" / raw["id"])
        assert row["references"] == [] and not os.path.isabs(row["source"])


def gedit_file(path, cases):
    """A file in the layout of GEdit-Bench: an Arrow stream with {bytes, path} for an image."""
    pyarrow = pytest.importorskip("pyarrow")
    items = []
    for seed, (group, key, language, common) in enumerate(cases):
        image = {"bytes": picture(path.parent / "one.png", seed).read_bytes(), "path": None}
        items.append(
            {
                "task_type": group,
                "key": key,
                "instruction": f"{language} {key}",
                "instruction_language": language,
                "input_image": image,
                "input_image_raw": image,
                "Intersection_exist": common,
            }
        )
    batch = pyarrow.RecordBatch.from_pylist(items)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file:
        with pyarrow.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
    return path


def test_gedit_rows_have_the_official_names(tmp_path, capsys):
    """test_gedit_score.py skips without a word what does not lie at exactly these names."""
    cases = [
        ("tone_transfer", "k", "en", True),
        ("tone_transfer", "k", "cn", False),
        ("subject-add", "m", "en", False),
    ]
    gedit_file(tmp_path / "hub/data/a.arrow", cases)
    rows = tmp_path / "runs/gedit.jsonl"
    assert run("rows", "gedit", tmp_path / "hub", "-o", rows) == 0
    found = lines_of(rows)
    names = [f"fullset/{group}/{language}/{key}" for group, key, language, _ in cases]
    assert [row["output"] for row in found] == [f"{name}.png" for name in names]
    assert [row["source"] for row in found] == [f"{name}_SRCIMG.png" for name in names]
    assert [row["intersection"] for row in found] == [True, False, False]
    for seed, row in enumerate(found):
        theirs = Image.open(picture(tmp_path / "same.png", seed))
        assert np.array_equal(Image.open(rows.parent / row["source"]), theirs)
    twice = gedit_file(tmp_path / "hub/data/b.arrow", cases[1:2])
    message = fails(capsys, "rows", "gedit", tmp_path / "hub", "-o", tmp_path / "no.jsonl")
    assert "rows 2 and 4" in message and names[1] in message
    gedit_file(twice, [("../..", "k", "en", True)])
    assert "cannot be named" in fails(capsys, "rows", "gedit", twice, "-o", tmp_path / "no.jsonl")
    for content in (b"ARROW1 is no stream", twice.read_bytes()[:900]):
        twice.write_bytes(content)
        assert "Arrow" in fails(capsys, "rows", "gedit", twice, "-o", tmp_path / "no.jsonl")
    assert not (tmp_path / "no.jsonl").exists()


def test_gedit_without_pyarrow_names_it(tmp_path, capsys, monkeypatch):
    """Only this benchmark needs the library; who lacks it should read what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.arrow").write_bytes(b"")
    message = fails(capsys, "rows", "gedit", tmp_path, "-o", tmp_path / "rows.jsonl")
    assert "pip install pyarrow" in message


@pytest.mark.parametrize(
    "name, text, keys",
    [
        (
            "a.json",
            '[{"src_video": "a.mp4", "prompt": "x", "edit_type": "add", "ref_img": "r.png"}]',
            ["0000"],
        ),
        (
            "a.json",
            '{"k1": {"video": "a.mp4", "instruction": "x", "references": ["r.png"]}}',
            ["k1"],
        ),
        (
            "a.jsonl",
            '{"source": "a.mp4", "text": "x", "key": 3, "reference": "r.png"}\n\n'
            '{"source": "b.jpg", "text": "y \u2028 z", "key": 4}\n',
            ["3", "4"],
        ),
        (
            "a.csv",
            '\ufeffOriginal_Video,Prompt,task,ref_image,name\na.mp4,"x, y",add,r.png,k\n'
            'b.jpg,"two\nlines",add,,m\n',
            ["k", "m"],
        ),
    ],
)
def test_other_rows_take_any_usual_file(name, text, keys, tmp_path):
    """VIE-Bench's own format is not established; a column that is missed is a case that is lost."""
    clip(tmp_path / "in/a.mp4")
    picture(tmp_path / "in/b.jpg")
    picture(tmp_path / "in/r.png")
    (tmp_path / "in" / name).write_text(text, encoding="utf-8", newline="")
    rows = tmp_path / "new/rows.jsonl"
    assert run("rows", "vie", tmp_path / "in" / name, "-o", rows) == 0
    found = lines_of(rows)
    suffixes = [".mp4", ".png"]
    assert [row["output"] for row in found] == [k + s for k, s in zip(keys, suffixes)]
    assert [row["references"] for row in found] == [["../in/r.png"], []][: len(keys)]
    assert all((rows.parent / row["source"]).is_file() for row in found)


def test_columns_with_other_names(tmp_path, capsys):
    """The error must show what there is, so that one look is enough."""
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('[{"Clip": "a.png", "what": "x", "group": "add"}]')
    command = "rows", "other", tmp_path / "a.json", "-o", tmp_path / "rows.jsonl"
    message = fails(capsys, *command)
    assert "clip, what, group" in message and "--columns source=" in message
    assert run(*command, "--columns", "source=Clip", "instruction=what", "kind=group") == 0
    [row] = lines_of(tmp_path / "rows.jsonl")
    assert (row["instruction"], row["kind"], row["source"]) == ("x", "add", "a.png")
    assert "NAME=COLUMN" in fails(capsys, *command, "--columns", "title=Clip")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "no list"),
        ("{", "no list"),
        ("", "holds no edits"),
        ('[{"source": "a.png", "prompt": "x", "key": "../k"}]', "cannot be named"),
        (
            '[{"source": "a.png", "prompt": "x", "key": "k"}, '
            '{"source": "a.png", "prompt": "y", "key": "k"}]',
            "rows 1 and 2 would both become k.png",
        ),
        ('[{"source": "a.png", "prompt": null}]', "instruction"),
        ('[{"source": "a.png", "prompt": "x", "references": [null]}]', "references are no list"),
    ],
)
def test_files_without_rows(text, message, tmp_path, capsys):
    """One line, and no file that a batch would take for the whole benchmark."""
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(text)
    rows = tmp_path / "rows.jsonl"
    assert message in fails(capsys, "rows", "other", tmp_path / "a.json", "-o", rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


# The judge.


def test_a_killed_run_goes_on_with_the_same_bytes(imgedit, ask, capsys, monkeypatch):
    """A run of hours that is cut off must lose one reply, and must not mix up the others."""
    rows, results = imgedit
    prompts, file = rows.parent / "bench/judge_prompt.json", results / "replies.jsonl"
    assert ask(rows, results, prompts) == 0
    whole = file.read_bytes()
    assert [line["output"] for line in lines_of(file)] == [f"{key}.png" for key in IMGEDIT]
    file.write_bytes(whole[: whole.index(b"\n") + 9])  # the second line is half written
    assert ask(rows, results, prompts) == 0 and file.read_bytes() == whole
    monkeypatch.setattr(score, "load_judge", None)  # with nothing to do, nothing is loaded
    assert ask(rows, results, prompts) == 0 and file.read_bytes() == whole
    assert capsys.readouterr().out.endswith("4 of 4 replies, 0 without a result, 0 failed\n")


def test_results_that_come_later_or_anew_are_judged(imgedit, ask, capsys):
    """A reply about the last model's result would be counted for this one's."""
    rows, results = imgedit
    prompts, file = rows.parent / "bench/judge_prompt.json", results / "replies.jsonl"
    (results / "22.png").rename(results / "later.png")
    (results / "7.png").write_bytes(b"no picture")
    assert ask(rows, results, prompts) == 1
    caught = capsys.readouterr()
    assert caught.err.count("\n") == 1 and "7.png" in caught.err
    assert "2 of 4 replies, 1 without a result, 1 failed" in caught.out
    _, first = table(capsys, rows, results)
    assert "4 of 4 missing (no result 1, not judged 1, no scores 2)" in first
    (results / "later.png").rename(results / "22.png")
    picture(results / "7.png", 7)
    picture(results / "1082.png", 8)
    assert ask(rows, results, prompts) == 0
    assert [line["output"] for line in lines_of(file)] == [
        "1082.png",
        "23.png",
        "1082.png",
        "22.png",
        "7.png",
    ]


def test_other_settings_are_refused(imgedit, ask, tiny_weights, capsys):
    """A table of two judges, or of two prompts, is the table of none."""
    (rows, results), weights = imgedit, tiny_weights / "mllm"
    prompts = rows.parent / "bench/judge_prompt.json"
    assert ask(rows, results, prompts) == 0
    replies = (results / "replies.jsonl").read_bytes()

    def refused(name, **changes):
        command = "judge", rows, results, "--prompts", prompts, "--weights", weights
        message = fails(capsys, *command, *changes.get("more", ()))
        assert "other settings" in message and f"{name} was" in message
        assert (results / "replies.jsonl").read_bytes() == replies

    refused("pixels", more=("--pixels", 256, 512))
    prompts.write_text(json.dumps(IMGEDIT_PROMPTS | {"add": "Rate anew: <edit_prompt>"}))
    refused("prompts")
    prompts.write_text(json.dumps(IMGEDIT_PROMPTS))
    rows.write_text(rows.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    refused("rows")
    assert "other rows" in fails(capsys, "table", rows, results)


class Recorder:
    """A judge that keeps what it is shown."""

    def __init__(self, reply="no"):
        self.asked, self.reply = [], reply
        self.min_pixels = self.max_pixels = 0

    def chat(self, parts, system=None, fps=2.0):
        self.asked.append((system, parts, fps))

    def generate(self, inputs, processor, max_new_tokens):
        return self.reply


@pytest.fixture
def recorder(monkeypatch):
    judge = Recorder()
    monkeypatch.setattr(score, "load_judge", lambda args, device: (judge, judge))
    return judge


def kinds(parts):
    return [part if isinstance(part, str) else np.asarray(part).shape for part in parts]


def test_imgedit_is_asked_in_the_official_order(imgedit, recorder, ask):
    """Words, source, result: a judge that sees them swapped scores the undoing of the edit."""
    rows, results = imgedit
    assert ask(rows, results, rows.parent / "bench/judge_prompt.json") == 0
    system, parts, _ = recorder.asked[0]
    assert system is None
    assert kinds(parts) == ["Rate adjust: Smooth the shell.", (24, 32, 3), (40, 40, 3)]
    assert np.array_equal(parts[2], Image.open(results / "1082.png"))


def gedit_rows(folder):
    """Rows of three cases as `rows gedit` writes them, without pyarrow."""
    rows = []
    for group, key, language, common in [
        ("a", "k", "en", True),
        ("a", "l", "en", False),
        ("b", "k", "en", False),
    ]:
        name = f"fullset/{group}/{language}/{key}"
        picture(folder / f"{name}_SRCIMG.png")
        picture(folder / f"{name}.png", 1, (16, 16))
        rows.append(
            {
                "benchmark": "gedit",
                "key": key,
                "kind": group,
                "source": f"{name}_SRCIMG.png",
                "instruction": f"do {key}",
                "output": f"{name}.png",
                "language": language,
                "intersection": common,
            }
        )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "gedit.jsonl").write_text(text)
    (folder / "vie_prompts.py").write_text(VIE_PROMPTS)
    return folder / "gedit.jsonl"


def test_gedit_is_asked_in_the_official_order(tmp_path, recorder, ask):
    """Pictures before words, the result at the source's size, and its quality without the source.

    The prompts are Python in the user's download: to run that file would be to run anything.
    """
    rows = gedit_rows(tmp_path)
    assert ask(rows, tmp_path, tmp_path / "vie_prompts.py") == 0
    (_, semantics, _), (system, quality, _) = recorder.asked[:2]
    assert len(recorder.asked) == 6 and system is None
    words = "You are an artist.\nTwo images.\n\nInstruction: do k\n"
    assert kinds(semantics) == [(24, 32, 3), (24, 32, 3), words]
    assert kinds(quality) == [(24, 32, 3), "You are an artist.\nOne image."]
    assert np.array_equal(semantics[1], quality[0])
    assert np.array_equal(semantics[0], Image.open(tmp_path / "fullset/a/en/k_SRCIMG.png"))


def test_clips_are_compared_over_the_frames_of_the_result(tmp_path, recorder, ask, capsys):
    """An edit is of the first frames: the rest of the source would count as not preserved."""
    clip(tmp_path / "a.mp4", frames=40)
    picture(tmp_path / "r.png", 0, (20, 20))
    source = {"source": "a.mp4", "prompt": "x"}
    raw = [source | {"reference": "r.png", "kind": "ref_add"}, source | {"kind": "tone"}]
    (tmp_path / "a.json").write_text(json.dumps(raw))
    rows, results = tmp_path / "rows.jsonl", tmp_path / "out"
    assert run("rows", "vie", tmp_path / "a.json", "-o", rows) == 0
    for name in ("0000.mp4", "0001.mp4"):
        clip(results / name, frames=24, size=(16, 16), seed=1)
    (tmp_path / "16.txt").write_text("Judge.")
    (tmp_path / "17.txt").write_text("Judge with the reference.")
    command = "judge", rows, results, "--weights", tmp_path, "--prompts", tmp_path / "16.txt"
    assert "text 2" in fails(capsys, *command)
    assert ask(rows, results, tmp_path / "16.txt", tmp_path / "17.txt") == 0
    (system, parts, fps), (other, _, _) = recorder.asked
    assert (system, other) == ("Judge with the reference.", "Judge.")
    assert kinds(parts) == ["x", (20, 20, 3), (6, 16, 16, 3), (6, 16, 16, 3)]
    assert fps == 2.0  # 24 frames at 8 a second


@pytest.mark.parametrize(
    "frames, fps, shown, rate",
    [(9, 4, [0, 3, 5, 8], 16 / 9), (27, 8, [0, 5, 10, 16, 21, 26], 16 / 9), (1, 8, [0], 8)],
)
def test_source_and_result_show_the_same_frames(frames, fps, shown, rate, tmp_path):
    """A source of another rate would be compared with other moments of the result.

    An odd number of frames is not what Qwen's own pipeline shows.
    """
    levels = np.arange(27, dtype=np.uint8)[:, None, None, None] * 9
    pixels = np.broadcast_to(levels, (27, 24, 32, 3))
    write_clip(tmp_path / "source.mp4", pixels, 30)
    write_clip(tmp_path / "result.mp4", pixels[:frames], fps)
    row = {"source": tmp_path / "source.mp4", "output": "result.mp4", "instruction": "x"}
    row |= {"references": []}
    asked = score.Benchmark().chat(row, "", {"text 1": "Judge."}, tmp_path)
    for clip in asked["parts"][1:]:
        assert (clip.mean((1, 2, 3)) / 9).round().astype(int).tolist() == shown
    assert asked["fps"] == pytest.approx(rate)


def test_a_reply_is_of_the_result_that_was_read(imgedit, recorder, ask, capsys):
    """A result that is made anew while it is judged would get the reply about the old one."""
    rows, results = imgedit

    def generate(*_):
        picture(results / "1082.png", 9)
        return LINES.format(5, 5, 5)

    recorder.generate = generate
    assert ask(rows, results, rows.parent / "bench/judge_prompt.json") == 0
    cells, first = table(capsys, rows, results)
    assert "1 of 4 missing (no result 0, not judged 1, no scores 0)" in first
    assert cells["adjust"] == ["1", "1", "-", "0.000", "3.56"]


@pytest.mark.parametrize(
    "prompts, message",
    [
        ({"adjust": "a", "add": "b"}, "extract"),
        ("text", "not a JSON object"),
        ([1], "not a JSON object"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, message, imgedit, ask, capsys):
    """A kind without its prompt would end the run after hours."""
    rows, results = imgedit
    file = rows.parent / "bench/judge_prompt.json"
    file.write_text(prompts if prompts == "text" else json.dumps(prompts))
    command = "judge", rows, results, "--prompts", file, "--weights", rows.parent
    assert message in fails(capsys, *command)
    assert not (results / "judge.json").exists()


def test_what_is_no_judge_is_named(imgedit, ask, capsys, tiny_weights):
    """A folder without Qwen2.5-VL, results that are nowhere, or pixels in the wrong order.

    A mistake leaves no settings behind, which would refuse the next try.
    """
    rows, results = imgedit
    folder = rows.parent / "broken"
    shutil.copytree(tiny_weights / "mllm", folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    command = "judge", rows, results, "--weights", folder, "--prompts"
    assert "damaged" in fails(capsys, *command, rows.parent / "bench/judge_prompt.json")
    assert ask(rows, results, rows.parent / "bench/judge_prompt.json") == 0
    shutil.rmtree(results)
    results.mkdir()
    common = "--prompts", rows.parent / "bench/judge_prompt.json", "--weights"
    message = fails(capsys, "judge", rows, results, *common, rows.parent / "bench")
    assert "bench is no Qwen2.5-VL" in message
    weights = tiny_weights / "mllm"
    assert "no folder" in fails(capsys, "judge", rows, rows.parent / "no", *common, weights)
    more = "--pixels", 9, 8
    assert "smaller" in fails(capsys, "judge", rows, results, *common, weights, *more)
    assert "score.py judge" in fails(capsys, "table", rows, results)
    (rows.parent / "bad.jsonl").write_text('{"source": "a.png"}\n')
    assert "score.py rows" in fails(capsys, "table", rows.parent / "bad.jsonl", results)


# Scores.


LINES = "Brief reasoning: it fits.\nPrompt Compliance: {}\nVisual: {}\nDetail & Integrity: {}"


@pytest.mark.parametrize(
    "reply, expected",
    [
        (LINES.format(5, 4, 3), 4),
        (LINES.format("**5**", "4/5", "3."), 4),
        (LINES.replace("Prompt Compliance:", "- **Prompt Compliance:**").format(2, 2, 2), 2),
        (LINES.format(5, 4, "3.5"), 12.5 / 3),
        ('{"a": 5, "b": "4", "c": 3}', 4),
        (LINES.format(5, 4, ""), None),
        (LINES.format(5, 4, 6), None),
        (LINES.format(5, 0, 4), None),
        (LINES.format(5, "4/10", 3), None),
        (LINES.format(5, "four", 3), None),
        ("", None),
        ("I'd say 5, 4 and 3.", None),
        (LINES.format(1, 2, 3) + "\nOverall: 4", None),
        (LINES.format(5, 4, "-3"), None),
        (LINES.format(5, 4, 3) + "\nOverall: -3", None),
        ('{"a": 5, "b": 4, "c": true}', None),
    ],
)
def test_scores_of_imgedit(reply, expected):
    """Three numbers from 1 to 5, or the case is missing; a guess would be a score of nothing."""
    found = score.BENCHMARKS["imgedit"].scores({}, [reply])
    assert found == (None if expected is None else [pytest.approx(expected)])


@pytest.mark.parametrize(
    "reply, expected",
    [
        ('{"score": [8, 6], "reasoning": "7 {or so}"}', 6),
        ('```json\n{"score" : [9, 7]}\n```', 7),
        ('Sure: {"score": [8, 6], "reasoning": "line\nbreak"} Bye {', 6),
        ("[8, 6]", 6),
        ('{"score": 5}', 5),
        ('{"score": ["8", "6/10"]}', 6),
        ('{"score": [0, 10]}', 0),
        ('{"score": [8, 6]}{"score": [8, 6]}', 6),
        ('{"score": [8, 6]} {"score": [8, 2]}', None),
        ('{"score": []}', None),
        ('{"score": [8, 11]}', None),
        ('{"score": [8, "bad"]}', None),
        ('{"score": [8, NaN]}', None),
        ('{"score": [8, -1]}', None),
        ('{"rating": [8, 6]}', None),
        ('{"score": [8, 6', None),
        ("8 and 6", None),
        ("", None),
        ("[" * 5000, None),
        ('{"a":' * 5000, None),
        ('{"score": [8, 1' + "0" * 400 + "]}", None),
        ('{"score": [8, "6/' + "1" * 5000 + '"]}', None),
        ('{"score": ' + "[" * 900 + "8" + "]" * 900 + "}", 8),
        ('{"scores": {"score": [8, 6]}}', 6),
        ('{"score": 8, "score": 6}', 6),
    ],
)
def test_scores_of_gedit(reply, expected):
    """The least of the list; the official scorer draws a random number where this says missing."""
    scores = score.BENCHMARKS["gedit"].scores
    good = '{"score": [4, 9]}'
    product = None if expected is None else [expected, 4, pytest.approx((4 * expected) ** 0.5)]
    assert scores({}, [reply, good]) == product
    assert (scores({}, [good, reply]) is None) == (expected is None)


@pytest.mark.parametrize(
    "references, reply, expected",
    [
        (
            0,
            '{"instruction": "add 3", "instruct follow score (1-10)": 9, '
            '"quality score (1-10)": 7, "preservation score (1-10)": 8, "reason": "fine"}',
            [9, 8, 7, None, 8],
        ),
        (
            1,
            "instruct follow score (1-10): 9\nquality score: 7/10\n**preservation score**: 8\n"
            "similarity score: 4",
            [9, 8, 7, 4, 7],
        ),
        (1, '{"instruct follow score": 9, "quality score": 7, "preservation score": 8}', None),
        (0, '{"instruct follow score": 9, "quality score": 0, "preservation score": 8}', None),
        (0, '{"quality": 7, "quality score": 6, "follow": 9, "preservation": 8}', None),
        (0, '{"quality": 7, "quality": 6, "follow": 9, "preservation": 8}', None),
    ],
)
def test_scores_of_vie(references, reply, expected):
    """Names are matched to the paper's columns, and similarity is asked for with a reference."""
    row = {"references": ["r"] * references}
    assert score.BENCHMARKS["vie"].scores(row, [reply]) == expected


def test_table_of_imgedit_by_hand(imgedit, capsys):
    """Three overalls go by one name, and only one of them is the paper's."""
    rows, results = imgedit
    answer(
        rows,
        results,
        {
            ("1082.png", ""): LINES.format(4, 4, 4),
            ("22.png", ""): LINES.format(5, 5, 5),
            ("23.png", ""): "no idea",
            ("7.png", ""): LINES.format(1, 1, 1),
        },
    )
    cells, first = table(capsys, rows, results)
    assert "judge J (01234567), prompts abcdefgh, 1 of 4 missing" in first
    assert "not comparable with tables made by another judge" in first
    assert cells["add"] == ["2", "1", "5.000", "2.500", "3.70"]
    assert cells["adjust"] == ["1", "0", "4.000", "4.000", "3.56"]
    assert cells["mean of 3 kinds"] == ["4", "1", "3.333", "2.500"]
    assert cells["mean of 2 kinds without extract"] == ["3", "1", "4.500", "3.250", "3.85"]
    assert cells["mean of all cases"] == ["4", "1", "3.333", "2.500"]
    written = json.loads((results / "result.json").read_text())
    assert written["22"] == LINES.format(5, 5, 5) and len(written) == 4
    (results / "7.png").unlink()
    cells, first = table(capsys, rows, results)
    assert "no result 1" in first and cells["extract"] == ["1", "1", "-", "0.000"]
    assert cells["mean of 2 kinds"] == ["4", "2", "4.500", "2.167"]
    assert len(json.loads((results / "result.json").read_text())) == 3


def test_table_of_gedit_by_hand(tmp_path, capsys):
    """O is the mean of roots, not the root of means; groups weigh the same, whatever their size."""
    rows, results = gedit_rows(tmp_path), tmp_path
    given = {"a/en/k": ([9, 8], [4, 2]), "a/en/l": ([4, 4], [9, 9]), "b/en/k": ([1, 5], [1, 1])}
    answer(
        rows,
        results,
        {
            (f"fullset/{name}.png", question): json.dumps({"score": values})
            for name, pair in given.items()
            for question, values in zip(("SC", "PQ"), pair)
        },
    )
    capsys.readouterr()
    assert run("table", rows, results) == 0
    whole, common = re.split("en, intersection", capsys.readouterr().out)
    line = next(line for line in whole.splitlines() if line.startswith("mean of 2 kinds"))
    assert line.split()[4:] == ["3", "0", "3.500", "3.250", "3.000", "3.000"]
    line = next(line for line in common.splitlines() if line.startswith("mean of 1 kinds"))
    assert line.split()[4:] == ["1", "0", "8.000", "2.000", "4.000", "4.000"]
    folder = results / "qwen25vl/eval_results_new"
    with open(folder / f"{results.name}_a_gpt_score.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == score.GEdit.csv_fields and len(found) == 2
    assert (found[0]["sementics_score"], found[0]["quality_score"]) == ("8.0", "2.0")
    assert [one["intersection_exist"] for one in found] == ["True", "False"]
    assert found[0]["instruction_language"] == "en"
    assert found[0]["edited_image"].endswith("fullset/a/en/k.png")


def test_kinds_of_vie_become_rows_of_the_paper(tmp_path, capsys):
    """Seven rows in the paper, nine kinds in its data: a kind in the wrong row changes two rows."""
    names = {
        "add": "Add",
        "object swap": "Swap/Change",
        "color_change": "Swap/Change",
        "Remove": "Remove",
        "style change": "Style/Tone",
        "tone/weather change": "Style/Tone",
        "hybrid": "Hybrid",
        "reference add": "Ref Add",
        "ref_swap": "Ref Swap",
        "odd": "odd",
    }
    for kind, expected in names.items():
        assert score.VIE().kind({"kind": kind, "references": []}) == expected
        with_reference = {"Add": "Ref Add", "Swap/Change": "Ref Swap"}.get(expected, expected)
        assert score.VIE().kind({"kind": kind, "references": ["a.png"]}) == with_reference
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(
        json.dumps([{"source": "a.png", "prompt": "x", "kind": kind} for kind in ("style", "tone")])
    )
    rows = tmp_path / "rows.jsonl"
    assert run("rows", "vie", tmp_path / "a.json", "-o", rows) == 0
    for name in ("0000.png", "0001.png"):
        picture(tmp_path / "out" / name)
    reply = "follow: {}\nquality: {}\npreservation: {}"
    answer(
        rows,
        tmp_path / "out",
        {("0000.png", ""): reply.format(9, 7, 8), ("0001.png", ""): reply.format(3, 3, 3)},
    )
    cells, _ = table(capsys, rows, tmp_path / "out")
    ours, paper = cells["Style/Tone"][:8], cells["Style/Tone"][8:]
    assert ours == ["2", "0", "6.000", "5.500", "5.000", "-", "5.500", "5.500"]
    assert paper == ["9.650", "9.099", "8.839", "-", "9.196", "(15)"]


def test_the_papers_rows_add_up():
    """A digit lost in copying would be somebody's result."""
    values = list(map(float, score.ImgEdit.paper.values()))
    assert len(values) == 8 and round(statistics.mean(values), 4) == 3.85
    for text in score.VIE.paper.values():
        *columns, average, _ = text.replace(" -", "").split()
        assert abs(statistics.mean(map(float, columns)) - float(average)) < 0.0011
