"""Scores edits on ImgEdit-Bench, GEdit-Bench and VIE-Bench by a local Qwen2.5-VL.

    python tests/score.py rows imgedit Benchmark/singleturn/singleturn.json -o imgedit.jsonl
    python edit.py --batch imgedit.jsonl -o runs/imgedit --weights weights/full
    python tests/score.py judge imgedit.jsonl runs/imgedit --weights ImgEdit_judge \\
        --prompts Benchmark/singleturn/judge_prompt.json --pixels 1016064 1354752
    python tests/score.py table imgedit.jsonl runs/imgedit

`rows` turns a published file into rows of edit.py, with the output names that the official scorers
read. `judge` asks a Qwen2.5-VL about every result, greedily, and appends each reply to
RESULTS/replies.jsonl; a second run goes on where the first one stopped. `table` prints means beside
the paper's, and writes the files that the official scripts read. A reply without scores counts as
missing: nothing is guessed.

The judges' prompts are not part of this repository. They come with ImgEdit and GEdit, as data that
are read and never run; those of VIE-Bench are Figures 16 and 17 of the paper, saved as text.
"""

import argparse
import ast
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edit import CLIP_OPTIONS, Parser, number, read_frames, whole

# What a column of a published file may be called. VIE-Bench's own names are not established.
ALIASES = {
    "source": "source src_video original_video video video_path input_video image".split(),
    "instruction": "instruction prompt edit_prompt text".split(),
    "kind": "kind edit_type edited_type task_type type task category".split(),
    "references": "references ref_img ref_image reference reference_image".split(),
    "key": "key index id name".split(),
}
IMGEDIT_COLUMNS = {"source": "id", "instruction": "prompt", "kind": "edit_type", "key": "key"}
GEDIT_COLUMNS = (
    "task_type",
    "key",
    "instruction",
    "instruction_language",
    "input_image",
    "Intersection_exist",
)
STILL_SUFFIXES = (".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")

JUDGE_FPS, FEWEST_FRAMES = 2.0, 4  # what a judge sees of a clip, as in Qwen's own pipeline
GEDIT_CONTEXT, GEDIT_RULES = (
    "_context_no_delimit",
    {  # constants of vie_prompts.py
        "SC": ("_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC"),
        "PQ": ("_prompts_0shot_rule_PQ",),
    },
)
VIE_METRICS = {"follow": "follow", "preserv": "preserv.", "quality": "quality", "similar": "simil."}
VIE_COLUMNS = (*VIE_METRICS.values(), "Avg")


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is judged, and the paper's own row of it (InstructX)."""

    scale: tuple  # least and most of a score
    columns: tuple  # of the table; the last one is the headline
    paper: dict  # kind -> values of the columns
    note: str
    questions: tuple = ("",)  # asked about each result
    max_tokens: int = 1024  # of a reply


BENCHMARKS = {
    "imgedit": Benchmark(
        (1, 5),
        ("mean",),
        {
            "adjust": "3.56",
            "remove": "3.92",
            "replace": "4.03",
            "add": "3.70",
            "style": "4.45",
            "compose": "3.27",
            "background": "3.63",
            "action": "4.24",
        },
        "Table 2, judged by GPT-4.1 as its section 4.2 says, by Qwen2.5-VL-72B as its caption says",
        max_tokens=2048,
    ),
    "gedit": Benchmark(
        (0, 10),
        ("Q_SC", "Q_PQ", "Q_O"),
        {},
        "7.47 7.22 6.68, Table 1, judged by Qwen2.5-VL-72B; language and set are not stated",
        questions=("SC", "PQ"),
        max_tokens=512,
    ),
    "vie": Benchmark(
        (1, 10),
        VIE_COLUMNS,
        {
            "Add": "8.446 8.683 7.919 - 8.349 (30)",
            "Swap/Change": "9.514 9.171 8.533 - 9.072 (35)",
            "Remove": "8.627 8.668 7.672 - 8.322 (30)",
            "Style/Tone": "9.650 9.099 8.839 - 9.196 (15)",
            "Hybrid": "9.448 8.862 8.411 - 8.907 (10)",
            "Ref Swap": "9.210 9.201 8.221 9.190 8.955 (10)",
            "Ref Add": "9.491 9.252 8.375 9.511 9.157 (10)",
        },
        "Table 3, with the number of cases, judged by GPT-4o",
    ),
    "other": Benchmark((1, 10), VIE_COLUMNS, {}, "none"),
}
IMGEDIT_PAPER_MEAN = "3.85"  # of its eight kinds, without extract
VIE_KINDS = {  # rows of Table 3: words in the names of their kinds
    "Hybrid": ("hybrid",),
    "Add": ("add",),
    "Remove": ("remov",),
    "Style/Tone": ("style", "tone", "weather"),
    "Swap/Change": ("swap", "change", "color", "replace"),
}
GEDIT_CSV = (
    "source_image",
    "edited_image",
    "instruction",
    "sementics_score",
    "quality_score",
    "intersection_exist",
    "instruction_language",
)


# Rows: from a published file to what edit.py edits.


def read_records(path):
    """[dict] of a JSON list, a JSON object of objects, JSON lines, or a .csv. ValueError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        try:
            content = json.loads(text)
        except ValueError:
            content = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} is neither JSON, JSON lines nor a .csv ({error})") from None
    if isinstance(content, dict) and all(isinstance(row, dict) for row in content.values()):
        content = [row | {"key": key} for key, row in content.items()]
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path} is no list of JSON objects")
    return content


def inside(name):
    """The name of a result, unchanged. Raises ValueError if it would leave the folder."""
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
        raise ValueError(f"a result cannot be named {name!r}")
    return name


def result_suffix(source):
    """The extension of a result: the source's own where edit.py writes it without loss."""
    suffix = Path(source).suffix.lower()
    return ".png" if suffix in STILL_SUFFIXES else suffix if suffix in CLIP_OPTIONS else ".mp4"


def file_rows(path, benchmark, columns):
    """Yields the rows of a file with a record per edit. Media lie relative to it. ValueError."""
    for index, record in enumerate(read_records(path)):
        record = {str(name).strip().lower(): value for name, value in record.items()}
        row = {}
        for name, aliases in ALIASES.items():
            aliases = [columns[name].lower()] if name in columns else aliases
            found = [record[alias] for alias in aliases if record.get(alias) not in (None, "")]
            row[name] = found[0] if found else None
        references = row["references"] or []
        references = references if isinstance(references, list) else [references]
        texts = [("source", row["source"]), ("instruction", row["instruction"])]
        for name, text in [*texts, *(("references", one) for one in references)]:
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}, record {index + 1} has no text for {name}; its columns are "
                    f"{', '.join(record)}; --columns {name}=COLUMN names one"
                )
        key = str(f"{index:04d}" if row["key"] is None else row["key"])
        suffix = ".png" if benchmark == "imgedit" else result_suffix(row["source"])
        yield {
            "benchmark": benchmark,
            "key": key,
            "kind": str(row["kind"] or "all"),
            "source": path.parent / row["source"],
            "instruction": row["instruction"],
            "references": [path.parent / name for name in references],
            "output": inside(key + suffix),
        }


def gedit_rows(path, folder):
    """Yields the rows of GEdit-Bench's .arrow file, and writes its sources below `folder`."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise ValueError("GEdit-Bench needs pyarrow: pip install pyarrow") from None
    try:
        with open(path, "rb") as file, pyarrow.ipc.open_stream(file) as batches:
            absent = [name for name in GEDIT_COLUMNS if name not in batches.schema.names]
            if absent:
                there = ", ".join(batches.schema.names)
                raise ValueError(f"{path} has no {', '.join(absent)}; its columns are {there}")
            for batch in batches:
                for item in batch.select(list(GEDIT_COLUMNS)).to_pylist():
                    yield gedit_row(item, path, folder)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no whole Arrow stream ({error})") from None


def gedit_row(item, path, folder):
    """One record of GEdit-Bench -> its row; writes its source."""
    key, group, language = (item[name] for name in ("key", "task_type", "instruction_language"))
    name = inside(f"fullset/{group}/{language}/{key}")
    source = folder / f"{name}_SRCIMG.png"
    source.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Image.open(io.BytesIO(item["input_image"]["bytes"])) as image, whole(source) as file:
            image.save(file, format="PNG")
    except (TypeError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: the image of {key} cannot be read ({error})") from None
    return {
        "benchmark": "gedit",
        "key": key,
        "kind": group,
        "source": source,
        "instruction": item["instruction"],
        "references": [],
        "output": f"{name}.png",
        "language": language,
        "intersection": bool(item["Intersection_exist"]),
    }


def write_rows(args):
    """`rows`: writes the rows file, whole or not at all."""
    columns, folder = dict(args.columns), args.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    if args.benchmark == "gedit":
        if columns:
            raise ValueError("GEdit-Bench has columns of its own: leave --columns out")
        files = [sorted(path.rglob("*.arrow")) if path.is_dir() else [path] for path in args.files]
        files = [file for found in files for file in found]
        rows = [row for file in files for row in gedit_rows(file, folder)]
    else:
        columns = IMGEDIT_COLUMNS | columns if args.benchmark == "imgedit" else columns
        rows = [row for path in args.files for row in file_rows(path, args.benchmark, columns)]
    if not rows:
        raise ValueError(f"{args.files[0]} holds no edits")
    numbers = {}
    for index, row in enumerate(rows, 1):
        if numbers.setdefault(row["output"], index) != index:
            pair = f"rows {numbers[row['output']]} and {index}"
            raise ValueError(f"{pair} would both become {row['output']}: their keys are equal")
    media = [path for row in rows for path in (row["source"], *row["references"])]
    absent = [path for path in media if not path.exists()]

    def relative(path):
        return os.path.relpath(Path(os.path.realpath(path.parent)) / path.name, here)

    here = os.path.realpath(folder)
    with whole(args.output) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for row in rows:
            row["source"] = relative(row["source"])
            row["references"] = [relative(path) for path in row["references"]]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    kinds = sorted(Counter(row["kind"] for row in rows).items())
    print(f"{args.output}: {len(rows)} rows: {', '.join(f'{kind} {n}' for kind, n in kinds)}")
    if absent:
        print(f"{len(absent)} of {len(media)} media are not there, such as {absent[0]}")


# The judge.


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def read_rows(path):
    """The rows of a file that `rows` wrote, with whole paths of their media. Raises ValueError."""
    rows = read_records(path)
    for index, row in enumerate(rows, 1):
        names = ["source", "instruction", "output", "key", "kind"]
        texts = [row.get(name) for name in names + ["language"] * (row.get("benchmark") == "gedit")]
        if row.get("benchmark") not in BENCHMARKS or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{path}, row {index} was not written by `score.py rows`")
        row["source"] = path.parent / row["source"]
        row["references"] = [path.parent / name for name in row.get("references") or []]
    if len({row["benchmark"] for row in rows}) != 1:
        raise ValueError(f"{path} should hold the rows of one benchmark")
    return rows


def read_strings(path):
    """{name: text} of a .json, of the constants in a .py, which is not run; else {"": text}."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".py":
            lines = [line for line in ast.parse(text).body if isinstance(line, ast.Assign)]
            pairs = [(getattr(line.targets[0], "id", ""), line.value) for line in lines]
            strings = {name: getattr(value, "value", None) for name, value in pairs}
            return {name: value for name, value in strings.items() if isinstance(value, str)}
        strings = json.loads(text) if path.suffix == ".json" else {"": text}
    except (ValueError, SyntaxError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    if not isinstance(strings, dict) or not all(isinstance(s, str) for s in strings.values()):
        raise ValueError(f"{path} should map names to texts")
    return strings


def read_prompts(files, rows):
    """The prompts of a benchmark by kind, by question, or by whether there is a reference."""
    benchmark, first = rows[0]["benchmark"], read_strings(files[0])
    if len(files) > (1 if benchmark in ("imgedit", "gedit") else 2):
        raise ValueError(f"--prompts names too many files for {benchmark}")
    if benchmark == "imgedit":
        needed, prompts = {row["kind"] for row in rows}, first
    elif benchmark == "gedit":
        names = {question: (GEDIT_CONTEXT, *rules) for question, rules in GEDIT_RULES.items()}
        needed = {name for group in names.values() for name in group}
        prompts = {q: "\n".join(first.get(name, "") for name in names[q]) for q in names}
    else:
        needed, prompts = {""}, {False: first.get("")}
        if len(files) > 1:
            prompts[True] = read_strings(files[1]).get("")
        if any(row["references"] for row in rows) and not prompts.get(True):
            raise ValueError("some rows have references: --prompts needs a second text, for those")
    absent = sorted(needed - first.keys())
    if absent:
        names = ", ".join(absent).strip() or "it should be one text"
        raise ValueError(f"{files[0]} lacks prompts of {benchmark}: {names}")
    return prompts


def judge_folders(folder):
    """The folders as of `locate`: those of an editor, or that of a Qwen2.5-VL alone."""
    from connector import locate
    from mllm import read_json

    config = folder / "config.json"
    if config.is_file() and read_json(config).get("model_type") == "qwen2_5_vl":
        return {"mllm": folder}
    try:
        return locate(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no Qwen2.5-VL; nor an editor's weights: {error}") from None


def weights_digest(folder):
    """A digest of a judge: its .json files, and the size and last megabyte of its weights."""
    pieces = [file.read_bytes() for file in sorted(folder.glob("*.json"))]
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stored:
            size = stored.seek(0, os.SEEK_END)
            stored.seek(max(0, size - 2**20))
            pieces += [str(size).encode(), stored.read()]
    return digest(b"\n".join(pieces))


def read_replies(path):
    """{(output, question): (reply, digest of the result)}, and the bytes of its whole lines.

    The last line may be half written.
    """
    data = path.read_bytes() if path.exists() else b""
    end = data.rfind(b"\n") + 1
    replies = {}
    try:
        for line in data[:end].splitlines():
            line = json.loads(line)
            replies[line["output"], line["question"]] = line["reply"], line["result"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} was not written by `score.py judge`") from None
    return replies, end


def reply_of(row, question, replies, results):
    """(what is wrong or "", the reply or ""). A reply counts for the file that was judged alone."""
    file = results / row["output"]
    if not file.is_file():
        return "no result", ""
    reply, judged = replies.get((row["output"], question), ("", ""))
    return ("", reply) if judged == digest(file.read_bytes()) else ("not judged", "")


def shown(media):
    """A picture (H, W, 3), or the frames of a clip that a judge sees, (T, H, W, 3)."""
    if not media.is_video:
        return media.frames[0]
    length = len(media.frames)
    count = min(length, max(FEWEST_FRAMES, round(length / media.fps * JUDGE_FPS)))
    return media.frames[np.linspace(0, length - 1, count).round().astype(int)]


def prompt_of(row, question, prompts, results):
    """System prompt, parts in the order of the official judge, and frames per second of clips.

    Raises MediaError or OSError.
    """
    result = read_frames(results / row["output"])
    if row["benchmark"] in ("imgedit", "gedit"):
        source, edited = read_frames(row["source"], 1).frames[0], result.frames[0]
        if row["benchmark"] == "imgedit":
            words = prompts[row["kind"]].replace("<edit_prompt>", row["instruction"])
            return None, [words, source, edited], JUDGE_FPS
        edited = Image.fromarray(edited).resize(source.shape[1::-1])
        words = prompts[question].replace("<instruction>", row["instruction"])
        pictures = [source, edited] if question == "SC" else [edited]
        return None, [*pictures, words], JUDGE_FPS
    height, width = result.frames.shape[1:3]
    source = read_frames(row["source"], len(result.frames), (width, height))
    references = [read_frames(path, 1).frames[0] for path in row["references"]]
    parts = [row["instruction"], *references, shown(source), shown(result)]
    frames = len(shown(result))
    fps = float(frames / len(result.frames) * result.fps) if result.is_video else JUDGE_FPS
    return prompts[bool(references)], parts, fps


def load_judge(args, folders):
    """(model, processor). Raises ValueError or OSError."""
    import torch

    from mllm import Processor, Qwen2_5_VL

    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one error
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {args.device} is not available ({reason})") from None
    processor = Processor.from_pretrained(folders.get("processor", folders["mllm"]))
    if args.pixels:
        processor.min_pixels, processor.max_pixels = args.pixels
    settings = folders["mllm"], args.device, getattr(torch, args.dtype)
    return Qwen2_5_VL.from_pretrained(*settings, config=folders.get("mllm_config")), processor


def read_settings(results):
    """The settings of a judge's run. Raises ValueError if there was none."""
    file = results / "judge.json"
    if not file.is_file():
        raise ValueError(f"there is no {file}: run `score.py judge` first")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object ({error})") from None


def judge(args):
    """`judge`: asks about every result that has no reply -> how many could not be asked about."""
    import torch  # here and not at the top, since `rows` and `table` need none

    rows = read_rows(args.rows)
    benchmark, prompts = BENCHMARKS[rows[0]["benchmark"]], read_prompts(args.prompts, rows)
    if args.pixels and args.pixels[0] > args.pixels[1]:
        raise ValueError("--pixels takes the smaller number first")
    if not args.results.is_dir():
        raise ValueError(f"there is no folder {args.results}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    folders = judge_folders(args.weights)
    settings = {
        "judge": args.weights.resolve().name,
        "weights": weights_digest(folders["mllm"]),
        "prompts": [digest(file.read_bytes()) for file in args.prompts],
        "rows": digest(args.rows.read_bytes()),
        "pixels": args.pixels,
        "dtype": args.dtype,
    }
    file = args.results / "replies.jsonl"
    replies, end = read_replies(file)
    before = read_settings(args.results) if replies else settings
    changes = [
        f"{name} was {before.get(name)}, is {settings[name]}"
        for name in settings
        if before.get(name) != settings[name]
    ]
    if changes:
        raise ValueError(f"{file} is of a run with other settings: {'; '.join(changes)}")
    pairs = [(row, question) for row in rows for question in benchmark.questions]
    states = [reply_of(*pair, replies, args.results)[0] for pair in pairs]
    todo = [pair for pair, state in zip(pairs, states) if state == "not judged"]
    if todo:
        model, processor = load_judge(args, folders)
        with whole(args.results / "judge.json") as unfinished:
            unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        with open(file, "ab") as log:
            log.truncate(end)
    failed = 0
    for row, question in tqdm(todo, "judged", disable=None):
        output = args.results / row["output"]
        try:
            system, parts, fps = prompt_of(row, question, prompts, args.results)
            inputs = processor.chat(parts, system, fps)
            reply = model.generate(inputs, processor, benchmark.max_tokens)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            failed += 1
            print(f"score.py: {output}: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        line = {"output": row["output"], "question": question, "reply": reply}
        line["result"] = digest(output.read_bytes())
        with open(file, "a", encoding="utf-8", newline="\n") as log:
            log.write(json.dumps(line, ensure_ascii=False) + "\n")
    there = len(pairs) - states.count("no result") - failed
    print(
        f"{there} of {len(pairs)} replies, {states.count('no result')} without a result, "
        f"{failed} failed"
    )
    return failed


# Scores.


def as_number(value, top):
    """A number, or a text such as "4", "**4**", "4/5" or "4." -> float; None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if abs(value) < 1e9 else None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:\s*/\s*(\d{1,3}))?\.?", str(value).strip(" *_`"))
    return float(match[1]) if match and int(match[2] or top) == top else None


def leaves(content, name=""):
    """Yields (name, value) of everything in a JSON value; items of a list share its name."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from leaves(value, name)
    else:
        yield name, content


def json_values(reply):
    """[leaves] of each JSON object in a reply, or of the list that it is."""
    decoder, start, found = json.JSONDecoder(strict=False), 0, []
    if reply.strip().startswith("["):
        reply = f'{{"score": {reply.strip()}}}'
    while (start := reply.find("{", start)) >= 0:
        try:
            content, start = decoder.raw_decode(reply, start)
            found.append(list(leaves(content)))
        except (ValueError, RecursionError):
            start += 1
    return found


def named_numbers(reply, top):
    """[(name in lower case, number or None)] of a reply: of its JSON, else of lines `Name: N`."""
    contents = [[(k.lower(), as_number(v, top)) for k, v in c] for c in json_values(reply)]
    contents = [c for c in contents if any(value is not None for _, value in c)]
    if contents:
        return contents[0] if all(c == contents[0] for c in contents) else []
    pairs = [line.rpartition(":") for line in reply.replace("*", "").splitlines()]
    named = [(name.strip().lower(), as_number(value, top)) for name, _, value in pairs if name]
    return [(name, value) for name, value in named if value is not None]


def scores(row, replies):
    """The values of a case by column, with None for a similarity that was not asked for.

    None for the whole case if a score is missing, appears twice, or lies outside of the scale.
    """
    benchmark = row["benchmark"]
    least, most = BENCHMARKS[benchmark].scale
    named = [named_numbers(reply, most) for reply in replies]
    if benchmark == "imgedit":
        parts = [[value for _, value in named[0] if value is not None]]
        complete = len(parts[0]) == 3
    elif benchmark == "gedit":
        parts = [[value for name, value in pairs if "score" in name] for pairs in named]
        complete = all(parts)
    else:
        words = list(VIE_METRICS)[: 4 if row["references"] else 3]
        parts = [[v for name, v in named[0] if word in name and v is not None] for word in words]
        complete = all(len(part) == 1 for part in parts)
    values = [value for part in parts for value in part]
    if not complete or not all(v is not None and least <= v <= most for v in values):
        return None
    if benchmark == "imgedit":
        return [sum(values) / 3]
    if benchmark == "gedit":
        semantics, quality = map(min, parts)
        return [semantics, quality, math.sqrt(semantics * quality)]
    average = sum(values) / len(values)
    return [*values, *[None] * (4 - len(values)), average]


def table_kind(row):
    """The kind of a row in the table; for VIE-Bench a row of the paper's Table 3 where one fits."""
    kind = row["kind"].lower()
    if row["benchmark"] != "vie":
        return row["kind"]
    fitting = [name for name, words in VIE_KINDS.items() if any(word in kind for word in words)]
    if not fitting:
        return row["kind"]
    if row["references"] or "ref" in kind:
        return "Ref Add" if fitting[0] == "Add" else "Ref Swap"
    return fitting[0]


def mean(values):
    """Of what is not None; None of nothing."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def means(cases, columns):
    """[values, None where missing] -> means of the columns, and of the last with zeros."""
    there = [case for case in cases if case]
    each = [mean([case[column] for case in there]) for column in range(len(columns))]
    return [*each, mean([case[-1] if case else 0.0 for case in cases])]


def block(title, rows, cases):
    """The lines of a table: heads, a line per kind, and the means of ImgEdit and GEdit."""
    name = rows[0]["benchmark"]
    paper, columns, kinds = BENCHMARKS[name].paper, BENCHMARKS[name].columns, {}
    for row, case in zip(rows, cases):
        kinds.setdefault(table_kind(row), []).append(case)
    order = [*filter(kinds.get, paper), *sorted(kinds.keys() - paper.keys())]
    each = {kind: means(kinds[kind], columns) for kind in order}
    lines = [(kind, kinds[kind], each[kind], paper.get(kind, "")) for kind in order]

    def mean_of(chosen, label, beside=""):
        scored = sum(each[kind][-2] is not None for kind in chosen)
        values = [mean(column) for column in zip(*map(each.get, chosen))]
        counted = [case for kind in chosen for case in kinds[kind]]
        lines.append((label.format(scored), counted, values, beside))

    if name in ("imgedit", "gedit"):
        mean_of(order, "mean of {} kinds")
    if name == "imgedit":
        others = [kind for kind in order if kind != "extract"]
        mean_of(others, "mean of {} kinds without extract", IMGEDIT_PAPER_MEAN)
        lines.append(("mean of all cases", cases, means(cases, columns), ""))
    heads = "".join(f"{head:>10}" for head in (*columns, "as zeros"))
    text = [f"{title:32}{'n':>7}{'missing':>9}{heads}{'  paper' if paper else ''}"]
    for label, counted, values, beside in lines:
        cells = "".join(f"{'-' if value is None else format(value, '.3f'):>10}" for value in values)
        counts = f"{len(counted):7}{counted.count(None):9}"
        text.append(f"{label:32}{counts}{cells}  {beside}".rstrip())
    return "\n".join(text)


def write_official(rows, replies, cases, results):
    """Writes what the official scripts of ImgEdit and GEdit read -> the files."""
    if rows[0]["benchmark"] == "imgedit":
        answers = {row["key"]: reply for row, (reply,) in zip(rows, replies) if reply}
        with whole(results / "result.json") as unfinished:
            text = json.dumps(answers, indent=2, ensure_ascii=False) + "\n"
            unfinished.write_text(text, encoding="utf-8")
        return [results / "result.json"]
    if rows[0]["benchmark"] != "gedit":
        return []
    folder = results / "qwen25vl" / "eval_results_new"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for group in sorted({row["kind"] for row in rows}):
        files.append(folder / f"{results.resolve().name}_{inside(group)}_gpt_score.csv")
        lines = [GEDIT_CSV]
        for row, case in zip(rows, cases):
            if case and row["kind"] == group:
                media = row["source"], results / row["output"], row["instruction"]
                lines.append((*media, *case[:2], row["intersection"], row["language"]))
        with whole(files[-1]) as part, open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
    return files


def table(args):
    """`table`: prints the means and writes the official files."""
    rows, settings = read_rows(args.rows), read_settings(args.results)
    if settings.get("rows") != digest(args.rows.read_bytes()):
        raise ValueError(f"{args.results} was judged with other rows than {args.rows}")
    benchmark, states = rows[0]["benchmark"], Counter()
    stored, _ = read_replies(args.results / "replies.jsonl")
    replies, cases = [], []
    for row in rows:
        pairs = [reply_of(row, q, stored, args.results) for q in BENCHMARKS[benchmark].questions]
        state = next((state for state, _ in pairs if state), "")
        replies.append(["" if state else reply for _, reply in pairs])
        cases.append(None if state else scores(row, replies[-1]))
        states[state or ("no scores" if cases[-1] is None else "")] += 1
    names = "no result", "not judged", "no scores"
    reasons = ", ".join(f"{name} {states[name]}" for name in names)
    prompts = " ".join(name[:8] for name in settings["prompts"])
    print(
        f"{benchmark}: scored with judge {settings['judge']} ({settings['weights'][:8]}), "
        f"prompts {prompts}, {len(rows) - states['']} of {len(rows)} missing ({reasons}); "
        "not comparable with tables made by another judge"
    )
    if benchmark == "gedit":
        for language in sorted({row["language"] for row in rows}):
            both = [pair for pair in zip(rows, cases) if pair[0]["language"] == language]
            common = [pair for pair in both if pair[0]["intersection"]]
            for title, pairs in (("all", both), ("intersection", common)):
                if pairs:
                    print("\n" + block(f"{language}, {title}", *zip(*pairs)))
    else:
        print("\n" + block("", rows, cases))
    print(f"\nthe paper's InstructX: {BENCHMARKS[benchmark].note}")
    for file in write_official(rows, replies, cases, args.results):
        print(f"wrote {file}")


def name_and_column(text):
    """A type for argparse: "source=clip" -> ("source", "clip")."""
    name, _, column = text.partition("=")
    if name not in ALIASES or not column:
        known = ", ".join(ALIASES)
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COLUMN with NAME of {known}")
    return name, column


def parse(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="score.py", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("rows", help="write rows for edit.py --batch").add_argument
    add("benchmark", choices=BENCHMARKS, help="other: any file with a record per edit")
    add("files", nargs="+", type=Path, metavar="FILE", help="as published; for gedit a folder")
    add("-o", "--output", type=Path, required=True, metavar="ROWS", help="the file to write")
    add(
        "--columns",
        nargs="+",
        type=name_and_column,
        default=[],
        metavar="NAME=COLUMN",
        help=f"where a column has another name; NAME: {', '.join(ALIASES)}",
    )
    add = commands.add_parser("judge", help="ask a Qwen2.5-VL about every result").add_argument
    add("rows", type=Path, metavar="ROWS")
    add("results", type=Path, metavar="RESULTS", help="the folder that edit.py --batch wrote")
    add(
        "--prompts",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="the judge's prompts: .json, .py or text; a second text for rows with references",
    )
    add("--weights", type=Path, required=True, metavar="DIR", help="a Qwen2.5-VL")
    add(
        "--pixels",
        nargs=2,
        type=number(int, 1, 2**31 - 1),
        metavar=("MIN", "MAX"),
        help="bounds of a picture's area (default: as the judge's files say)",
    )
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda if there is one, else cpu)")
    help = "(default: bfloat16 on CUDA, else float32)"
    add("--dtype", choices=("float32", "bfloat16"), help=help)
    add = commands.add_parser("table", help="print means, write the official files").add_argument
    add("rows", type=Path, metavar="ROWS")
    add("results", type=Path, metavar="RESULTS")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns 0, or 1 if a result could not be judged; ends with 2 after one line on a mistake."""
    args = parse(argv)
    try:
        if args.command == "judge":
            return min(1, judge(args))
        (write_rows if args.command == "rows" else table)(args)
        return 0
    except (ValueError, OSError) as error:
        Parser(prog="score.py").error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
