"""Scores edits on ImgEdit-Bench, GEdit-Bench and VIE-Bench by a local Qwen2.5-VL.

    python tests/score.py rows imgedit Benchmark/singleturn/singleturn.json -o imgedit.jsonl
    python edit.py --batch imgedit.jsonl -o runs/imgedit --weights weights/kiwi
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
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import edit
from edit import read_frames, whole


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
        if isinstance(content, dict) and all(isinstance(row, dict) for row in content.values()):
            content = [row | {"key": key} for key, row in content.items()]
        elif isinstance(content, dict):  # JSON lines, but one only
            content = [content]
        return [dict(record) for record in content]
    except (ValueError, TypeError, csv.Error) as error:
        problem = "is no list of edits as JSON, JSON lines or .csv"
        raise ValueError(f"{path} {problem} ({error})") from None


def result_suffix(source):
    """The extension of a result: the source's own where a clip may have it, else .png or .mp4."""
    suffix = source.suffix.lower()
    if suffix in edit.CLIP_OPTIONS:
        return suffix
    return ".png" if Image.registered_extensions().get(suffix) in edit.IMAGE_FORMATS else ".mp4"


def inside(name):
    """The name of a result, unchanged. Raises ValueError if it would leave the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"a result cannot be named {name!r}")
    return name


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def mean(values):
    """Of what is not None; None of nothing."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def as_number(value, top):
    """A number, or a text such as "4", "**4**", "4/5" or "4." -> float; None for anything else."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d{1,3}))?\.?", str(value).strip(" *_`"))
    return float(match[1]) if match and int(match[2] or top) == top else None


def leaves(content, name=""):
    """Yields (name, value) of all that a JSON value holds; the items of a list share its name."""
    if isinstance(content, tuple):  # an object
        for key, value in content:
            yield from leaves(value, key.lower())
    elif isinstance(content, list):
        for value in content:
            yield from leaves(value, name)
    else:
        yield name, content


def named_numbers(reply, top):
    """[(name in lower case, number or None)] of a reply: of its JSON, else of lines `Name: N`.

    [] if JSON objects contradict each other.
    """
    if reply.strip().startswith("["):
        reply = f'{{"score": {reply}}}'
    decoder = json.JSONDecoder(object_pairs_hook=tuple, strict=False)  # keeps names given twice
    objects, start = [], 0
    while (start := reply.find("{", start)) >= 0:
        try:
            content, start = decoder.raw_decode(reply, start)
            pairs = [(name, as_number(value, top)) for name, value in leaves(content)]
        except (ValueError, RecursionError):
            start += 1
            continue
        if any(value is not None for _, value in pairs):
            objects.append(pairs)
    if objects:
        return objects[0] if all(pairs == objects[0] for pairs in objects) else []
    lines = [line.rpartition(":") for line in reply.replace("*", "").splitlines()]
    pairs = [(name.lower(), as_number(value, top)) for name, _, value in lines if name]
    return [(name, value) for name, value in pairs if value is not None]


# The benchmarks.


class Benchmark:
    """Any file with a record per edit, judged as VIE-Bench is. Subclasses say what differs.

    A row is what edit.py reads, with its key and kind. A case is what a row scored: a value for
    each column of the table.
    """

    aliases = {  # of columns; VIE-Bench's own names are not established
        "source": "source src_video original_video video video_path input_video image".split(),
        "instruction": "instruction prompt edit_prompt text".split(),
        "kind": "kind edit_type edited_type task_type type task category".split(),
        "references": "references ref_img ref_image reference reference_image".split(),
        "key": "key index id name".split(),
    }
    questions = ("",)  # asked about each result
    max_tokens = 1024  # of a reply
    scale = (1, 10)  # least and most of a score
    columns = ("follow", "preserv.", "quality", "simil.", "Avg")  # the last one is the headline
    overalls = {}  # means of kinds, by the kind that is left out: the paper's value
    paper = {}  # InstructX's values by kind
    note = "none"  # on the paper's values

    def rows(self, path, columns, folder):
        """Yields the rows of a published file, with whole paths of media. Raises ValueError.

        columns: {name: [column]} where a column is not called as usual.
        folder: of the rows file.
        """
        for index, record in enumerate(read_records(path)):
            record = {str(name).strip().lower(): value for name, value in record.items()}
            row = {"key": f"{index:04d}", "kind": "all"}
            for name, aliases in (self.aliases | columns).items():
                values = [record[alias] for alias in aliases if record.get(alias) not in (None, "")]
                if values:
                    row[name] = values[0]
            if isinstance(row.get("references"), str):
                row["references"] = [row["references"]]
            try:
                row = edit.read_row(json.dumps(row), path.parent)
            except ValueError as error:
                names = f"its columns are {', '.join(record)}; --columns source=COLUMN names one"
                raise ValueError(f"{path}, record {index + 1}: {error}; {names}") from None
            key = str(row["key"])
            output = inside(key + result_suffix(row["source"]))
            yield row | {"key": key, "kind": str(row["kind"]), "output": output}

    def prompt(self, row, question, prompts):
        """The judge's prompt. Raises KeyError if it is not among the prompts."""
        return prompts["text 2" if row["references"] else "text 1"]

    def chat(self, row, question, prompts, results):
        """Arguments of Processor.chat, with parts in the order of the official judge.

        The source is cut to the length of the result, and both show the same frames. Raises
        MediaError or OSError.
        """
        result = read_frames(results / row["output"])
        length, height, width, _ = result.frames.shape
        source = read_frames(row["source"], length, (width, height))
        references = [read_frames(path, 1).frames[0] for path in row["references"]]
        media, fps = [source.frames[0], result.frames[0]], 2.0
        if result.is_video:
            # As Qwen's own pipeline: two frames per second, at least four, an even number.
            count = min(length, max(4, int(2 * length / result.fps)))
            count = max(1, count // 2 * 2)
            shown = np.linspace(0, length - 1, count).round().astype(int)
            last = len(source.frames) - 1
            media = [source.frames[shown.clip(max=last)], result.frames[shown]]
            fps = float(count / length * result.fps)
        parts = [row["instruction"], *references, *media]
        return {"system": self.prompt(row, question, prompts), "parts": parts, "fps": fps}

    def scores(self, row, replies):
        """The case of a row; None if a score is absent, appears twice, or is not on the scale."""
        pairs, values = named_numbers(replies[0], self.scale[1]), []
        for word in ("follow", "preserv", "quality", "similar")[: 4 if row["references"] else 3]:
            found = [value for name, value in pairs if word in name and value is not None]
            if len(found) != 1:
                return None
            values += found
        not_asked = [None] * (4 - len(values))
        return [*values, *not_asked, mean(values)] if self.on_scale(values) else None

    def on_scale(self, values):
        least, most = self.scale
        return all(value is not None and least <= value <= most for value in values)

    def kind(self, row):
        """The line of the table in which a row counts."""
        return row["kind"]

    def tables(self, pairs):
        """[(row, case)] -> (title, those of it) for each table."""
        return [("", pairs)]

    def write_official(self, pairs, replies, results):
        """Writes what the official scripts read -> the files."""
        return []


class ImgEdit(Benchmark):
    """ImgEdit-Bench, single turn: the mean of three scores."""

    aliases = Benchmark.aliases | {"source": ["id"]}
    max_tokens = 2048
    scale = (1, 5)
    columns = ("mean",)
    overalls = {None: "", "extract": "3.85"}
    paper = {"adjust": "3.56", "remove": "3.92", "replace": "4.03", "add": "3.70"}
    paper |= {"style": "4.45", "compose": "3.27", "background": "3.63", "action": "4.24"}
    note = "Table 2, judged by GPT-4.1 (so its section 4.2) or Qwen2.5-VL-72B (so its caption)"

    def prompt(self, row, question, prompts):
        return prompts[row["kind"]].replace("<edit_prompt>", row["instruction"])

    def chat(self, row, question, prompts, results):
        paths = row["source"], results / row["output"]
        pictures = [read_frames(path, 1).frames[0] for path in paths]
        return {"parts": [self.prompt(row, question, prompts), *pictures]}

    def scores(self, row, replies):
        pairs = named_numbers(replies[0], self.scale[1])
        values = [value for _, value in pairs if value is not None]
        return [mean(values)] if len(values) == 3 and self.on_scale(values) else None

    def write_official(self, pairs, replies, results):
        answers = {row["key"]: reply for (row, _), (reply,) in zip(pairs, replies) if reply}
        text = json.dumps(answers, indent=2, ensure_ascii=False) + "\n"
        with whole(results / "result.json") as unfinished:
            unfinished.write_text(text, encoding="utf-8")
        return [results / "result.json"]


class GEdit(Benchmark):
    """GEdit-Bench: semantic consistency, perceptual quality, and the root of their product."""

    questions = ("SC", "PQ")
    max_tokens = 512
    scale = (0, 10)
    columns = ("Q_SC", "Q_PQ", "Q_O")
    overalls = {None: ""}
    note = "7.47 7.22 6.68, Table 1, judged by Qwen2.5-VL-72B; language and set are not stated"
    rules = {  # constants of vie_prompts.py
        "SC": ("_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC"),
        "PQ": ("_prompts_0shot_rule_PQ",),
    }
    fields = "task_type key instruction instruction_language input_image Intersection_exist".split()
    csv_fields = "source_image edited_image instruction sementics_score quality_score".split()
    csv_fields += ["intersection_exist", "instruction_language"]

    def rows(self, path, columns, folder):
        """Yields the rows of an .arrow file, or of a folder of them, and writes their sources."""
        try:
            from pyarrow import ArrowInvalid, ipc
        except ImportError:
            raise ValueError("GEdit-Bench needs pyarrow: pip install pyarrow") from None
        for file in sorted(path.rglob("*.arrow")) if path.is_dir() else [path]:
            try:
                with open(file, "rb") as stored, ipc.open_stream(stored) as batches:
                    for batch in batches:
                        for record in batch.select(self.fields).to_pylist():
                            yield self.row(record, folder)
            except (ArrowInvalid, KeyError) as error:
                raise ValueError(f"{file} is no Arrow stream of GEdit-Bench ({error})") from None

    def row(self, record, folder):
        """A record -> its row. Writes its source below `folder`."""
        kind, language = record["task_type"], record["instruction_language"]
        name = inside(f"fullset/{kind}/{language}/{record['key']}")
        source = folder / f"{name}_SRCIMG.png"
        source.parent.mkdir(parents=True, exist_ok=True)
        with whole(source) as unfinished:
            Image.open(io.BytesIO(record["input_image"]["bytes"])).save(unfinished, "PNG")
        row = {"key": record["key"], "kind": kind, "source": source, "references": []}
        row |= {"instruction": record["instruction"], "output": f"{name}.png"}
        return row | {"language": language, "intersection": bool(record["Intersection_exist"])}

    def prompt(self, row, question, prompts):
        texts = [prompts[name] for name in ("_context_no_delimit", *self.rules[question])]
        return "\n".join(texts).replace("<instruction>", row["instruction"])

    def chat(self, row, question, prompts, results):
        paths = row["source"], results / row["output"]
        source, result = (Image.fromarray(read_frames(path, 1).frames[0]) for path in paths)
        result = result.resize(source.size)
        pictures = [source, result] if question == "SC" else [result]
        return {"parts": [*pictures, self.prompt(row, question, prompts)]}

    def scores(self, row, replies):
        replies = [named_numbers(reply, self.scale[1]) for reply in replies]
        lists = [[value for name, value in pairs if "score" in name] for pairs in replies]
        if not all(values and self.on_scale(values) for values in lists):
            return None
        semantics, quality = map(min, lists)
        return [semantics, quality, math.sqrt(semantics * quality)]

    def tables(self, pairs):
        for language in sorted({row["language"] for row, _ in pairs}):
            spoken = [pair for pair in pairs if pair[0]["language"] == language]
            yield f"{language}, all", spoken
            yield f"{language}, intersection", [pair for pair in spoken if pair[0]["intersection"]]

    def write_official(self, pairs, replies, results):
        folder, lines = results / "qwen25vl" / "eval_results_new", {}
        folder.mkdir(parents=True, exist_ok=True)
        for row, (semantics, quality, _) in pairs:
            file = folder / f"{results.resolve().name}_{row['kind']}_gpt_score.csv"
            lines.setdefault(file, [self.csv_fields])
            if semantics is not None:
                line = [row["source"], results / row["output"], row["instruction"]]
                line += [semantics, quality, row["intersection"], row["language"]]
                lines[file].append(line)
        for file in lines:
            with whole(file) as part, open(part, "w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(lines[file])
        return sorted(lines)


class VIE(Benchmark):
    """VIE-Bench, in the lines of the paper's table."""

    paper = {
        "Add": "8.446 8.683 7.919 - 8.349 (30)",
        "Swap/Change": "9.514 9.171 8.533 - 9.072 (35)",
        "Remove": "8.627 8.668 7.672 - 8.322 (30)",
        "Style/Tone": "9.650 9.099 8.839 - 9.196 (15)",
        "Hybrid": "9.448 8.862 8.411 - 8.907 (10)",
        "Ref Swap": "9.210 9.201 8.221 9.190 8.955 (10)",
        "Ref Add": "9.491 9.252 8.375 9.511 9.157 (10)",
    }
    note = "Table 3, with the number of cases, judged by GPT-4o"
    words = {  # in the names of kinds, of which the first that fits decides
        "Hybrid": ("hybrid",),
        "Add": ("add",),
        "Remove": ("remov",),
        "Style/Tone": ("style", "tone", "weather"),
        "Swap/Change": ("swap", "change", "color", "replace"),
    }

    def kind(self, row):
        """A line of the paper's Table 3 where one fits."""
        kind = row["kind"].lower()
        fitting = (line for line in self.words if any(word in kind for word in self.words[line]))
        line = next(fitting, row["kind"])
        if row["references"] or "ref" in kind:
            return {"Add": "Ref Add", "Swap/Change": "Ref Swap"}.get(line, line)
        return line


BENCHMARKS = {"imgedit": ImgEdit(), "gedit": GEdit(), "vie": VIE(), "other": Benchmark()}


# The commands.


def write_rows(args):
    """`rows`: writes the rows file, whole or not at all."""
    benchmark, folder = BENCHMARKS[args.benchmark], args.output.parent.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    columns = dict(args.columns)
    rows = [row for path in args.files for row in benchmark.rows(path, columns, folder)]
    if not rows:
        raise ValueError(f"{args.files[0]} holds no edits")
    numbers = {}
    for i, row in enumerate(rows, 1):
        other = numbers.setdefault(row["output"], i)
        if other != i:
            problem = f"would both become {row['output']}: their keys are equal"
            raise ValueError(f"rows {other} and {i} {problem}")
        media = [path.parent.resolve() / path.name for path in (row["source"], *row["references"])]
        row["source"], *row["references"] = [os.path.relpath(path, folder) for path in media]
    with whole(args.output) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"benchmark": args.benchmark} | row, ensure_ascii=False) + "\n")
    kinds = sorted(Counter(row["kind"] for row in rows).items())
    print(f"{args.output}: {len(rows)} rows: {', '.join(f'{kind} {n}' for kind, n in kinds)}")


def read_rows(path):
    """(Benchmark, rows) of a file that `rows` wrote, with whole paths of media. ValueError."""
    try:
        rows = [edit.read_row(line, path.parent) for _, line in edit.read_lines(path)]
        [name] = {row["benchmark"] for row in rows}
        return BENCHMARKS[name], rows
    except (ValueError, KeyError) as error:
        problem = "does not hold the rows of one benchmark, as `score.py rows` writes them"
        raise ValueError(f"{path} {problem} ({error})") from None


def read_prompts(files, benchmark, rows):
    """{name: text} of .json and of constants in .py, which is not run; "text 1" of a first .txt.

    Raises ValueError if a row needs another one.
    """
    from mllm import read_json

    prompts = {}
    for i, path in enumerate(files, 1):
        if path.suffix == ".json":
            prompts |= read_json(path)
        elif path.suffix == ".py":
            for line in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant):
                    prompts[ast.unparse(line.targets[0])] = line.value.value
        else:
            prompts[f"text {i}"] = path.read_text(encoding="utf-8-sig")
    try:
        for row, question in itertools.product(rows, benchmark.questions):
            benchmark.prompt(row, question, prompts)
    except KeyError as error:
        raise ValueError(f"--prompts lacks {error}") from None
    return prompts


def read_replies(results):
    """{(output, question, digest of the result): reply}, and the bytes of its whole lines."""
    file = results / "replies.jsonl"
    data = file.read_bytes() if file.exists() else b""
    end = data.rfind(b"\n") + 1  # the last line may be half written
    replies = {}
    for line in map(json.loads, data[:end].splitlines()):
        replies[line["output"], line["question"], line["result"]] = line["reply"]
    return replies, end


def reply_of(row, question, replies, results):
    """(what is wrong or "", the reply or ""). A reply counts only for the file that was judged."""
    file = results / row["output"]
    if not file.is_file():
        return "no result", ""
    reply = replies.get((row["output"], question, digest(file.read_bytes())))
    return ("not judged", "") if reply is None else ("", reply)


def settings_of(args):
    """What decides the replies. Raises ValueError for what is no Qwen2.5-VL."""
    import torch  # here and not at the top, since `rows` and `table` need none

    if edit.read_config(args.weights).get("model_type") != "qwen2_5_vl":
        raise ValueError(f"{args.weights} is no Qwen2.5-VL")
    weights = [file.read_bytes() for file in sorted(args.weights.glob("*.json"))]
    for file in sorted(args.weights.glob("*.safetensors")):
        weights.append(np.memmap(file, mode="r")[-(2**20) :].tobytes())  # the end tells them apart
    return {
        "judge": args.weights.resolve().name,
        "weights": digest(b"\n".join(weights)),
        "prompts": [digest(file.read_bytes()) for file in args.prompts],
        "rows": digest(args.rows.read_bytes()),
        "pixels": args.pixels,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def load_judge(args, device):
    """(model, processor): in bfloat16 on CUDA, else in float32. Raises ValueError or OSError."""
    import torch

    from mllm import Processor, Qwen2_5_VL

    processor = Processor.from_pretrained(args.weights)
    if args.pixels:
        processor.min_pixels, processor.max_pixels = args.pixels
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Qwen2_5_VL.from_pretrained(args.weights, device, dtype), processor


def judge(args):
    """`judge`: asks about every result that has no reply -> how many could not be asked about."""
    benchmark, rows = read_rows(args.rows)
    prompts, settings = read_prompts(args.prompts, benchmark, rows), settings_of(args)
    if args.pixels and args.pixels[0] > args.pixels[1]:
        raise ValueError("--pixels takes the smaller number first")
    if not args.results.is_dir():
        raise ValueError(f"there is no folder {args.results}")
    replies, end = read_replies(args.results)
    before = edit.read_config(args.results, "judge.json") if replies else settings
    for name, value in settings.items():
        if before.get(name) != value:
            change = f"{name} was {before.get(name)}, is {value}"
            raise ValueError(f"{args.results} has replies of other settings: {change}")
    pairs = list(itertools.product(rows, benchmark.questions))
    states = [reply_of(*pair, replies, args.results)[0] for pair in pairs]
    unjudged = [pair for pair, state in zip(pairs, states) if state == "not judged"]
    failed, absent = 0, states.count("no result")
    if unjudged:
        loaded = load_judge(args, settings["device"])
        with whole(args.results / "judge.json") as unfinished:
            unfinished.write_text(json.dumps(settings, indent=2) + "\n")
        with open(args.results / "replies.jsonl", "ab") as log:
            log.truncate(end)
            for pair in tqdm(unjudged, "judged", disable=None):
                failed += not ask(*pair, benchmark, prompts, loaded, args.results, log)
    there = len(pairs) - absent - failed
    print(f"{there} of {len(pairs)} replies, {absent} without a result, {failed} failed")
    return failed


def ask(row, question, benchmark, prompts, loaded, results, log):
    """Asks about a result and logs the reply -> whether that went well."""
    (model, processor), output = loaded, results / row["output"]
    try:
        judged = digest(output.read_bytes())  # first, since it may be made anew meanwhile
        inputs = processor.chat(**benchmark.chat(row, question, prompts, results))
        reply = model.generate(inputs, processor, benchmark.max_tokens)
    except Exception as error:
        if not edit.explain(error):  # a fault of the program
            raise
        problem = " ".join((str(error) or repr(error)).split())
        edit.say(f"score.py: {output}: {problem}", sys.stderr)
        return False
    line = {"output": row["output"], "question": question, "reply": reply, "result": judged}
    log.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    log.flush()
    return True


def means(cases):
    """The means of the columns, and that of the last one with zeros for what is missing."""
    return [*map(mean, zip(*cases)), mean([case[-1] or 0.0 for case in cases])]


def block(benchmark, title, pairs):
    """The text of a table of [(row, case)]: heads, a line per kind, and overall means."""
    paper, kinds = benchmark.paper, {}
    for row, case in pairs:
        kinds.setdefault(benchmark.kind(row), []).append(case)
    order = [*filter(kinds.get, paper), *sorted(kinds.keys() - paper.keys())]
    each = {kind: means(kinds[kind]) for kind in order}
    lines = [(kind, kinds[kind], each[kind], paper.get(kind, "")) for kind in order]
    for left_out, beside in benchmark.overalls.items():
        chosen = [kind for kind in order if kind != left_out]
        scored = sum(each[kind][0] is not None for kind in chosen)
        label = f"mean of {scored} kinds" + (f" without {left_out}" if left_out else "")
        cases = [case for kind in chosen for case in kinds[kind]]
        lines.append((label, cases, map(mean, zip(*(each[kind] for kind in chosen))), beside))
    cases = [case for _, case in pairs]
    lines.append(("mean of all cases", cases, means(cases), ""))
    heads = "".join(f"{head:>10}" for head in (*benchmark.columns, "as zeros"))
    text = [f"{title:32}{'n':>7}{'missing':>9}{heads}{'  paper' if paper else ''}"]
    for label, cases, values, beside in lines:
        missing = sum(case[-1] is None for case in cases)
        cells = "".join(f"{'-' if value is None else format(value, '.3f'):>10}" for value in values)
        text.append(f"{label:32}{len(cases):7}{missing:9}{cells}  {beside}".rstrip())
    return "\n".join(text)


def table(args):
    """`table`: prints the means and writes the official files."""
    benchmark, rows = read_rows(args.rows)
    settings = edit.read_config(args.results, "judge.json")
    if settings.get("rows") != digest(args.rows.read_bytes()):
        problem = f"was judged with other rows than {args.rows}, or not at all"
        raise ValueError(f"{args.results} {problem}: run `score.py judge`")
    stored, _ = read_replies(args.results)
    pairs, replies, missing = [], [], Counter({"no result": 0, "not judged": 0, "no scores": 0})
    for row in rows:
        found = [reply_of(row, question, stored, args.results) for question in benchmark.questions]
        states, texts = zip(*found)
        case = None if any(states) else benchmark.scores(row, texts)
        if case is None:
            missing[next(filter(None, states), "no scores")] += 1
        pairs.append((row, case or [None] * len(benchmark.columns)))
        replies.append(texts)
    reasons = ", ".join(f"{reason} {count}" for reason, count in missing.items())
    prompts = " ".join(name[:8] for name in settings["prompts"])
    print(
        f"{rows[0]['benchmark']}: scored with judge {settings['judge']} "
        f"({settings['weights'][:8]}), prompts {prompts}, "
        f"{missing.total()} of {len(rows)} missing ({reasons}); "
        "not comparable with tables made by another judge"
    )
    for title, chosen in benchmark.tables(pairs):
        if chosen:
            print("\n" + block(benchmark, title, chosen))
    print(f"\nthe paper's InstructX: {benchmark.note}")
    for file in benchmark.write_official(pairs, replies, args.results):
        print(f"wrote {file}")


# The terminal.


def name_and_column(text):
    """A type for argparse: "source=Clip" -> ("source", ["clip"])."""
    name, _, column = text.partition("=")
    if name not in Benchmark.aliases or not column:
        known = ", ".join(Benchmark.aliases)
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COLUMN with NAME of {known}")
    return name, [column.lower()]


def parse(argv):
    """The arguments; ends the program with one line on a mistake."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = edit.Parser(prog="score.py", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    rows = commands.add_parser("rows", help="write rows for edit.py --batch")
    judged = commands.add_parser("judge", help="ask a Qwen2.5-VL about every result")
    printed = commands.add_parser("table", help="print means, write the official files")

    def add(command, name, metavar, convert, help, **settings):
        command.add_argument(*name.split(), metavar=metavar, type=convert, help=help, **settings)

    help = "other: any file with a record per edit"
    add(rows, "benchmark", None, str, help, choices=BENCHMARKS)
    add(rows, "files", "FILE", Path, "as published; for gedit a folder", nargs="+")
    add(rows, "-o --output", "ROWS", Path, "the file to write", required=True)
    help = f"where a column has another name, but for gedit; NAME: {', '.join(Benchmark.aliases)}"
    add(rows, "--columns", "NAME=COLUMN", name_and_column, help, nargs="+", default=[])
    for command in (judged, printed):
        add(command, "rows", "ROWS", Path, "the file that `rows` wrote")
        add(command, "results", "RESULTS", Path, "the folder that edit.py --batch wrote")
    help = "the judge's prompts: .json, .py or text; a second text for rows with references"
    add(judged, "--prompts", "FILE", Path, help, nargs="+", required=True)
    add(judged, "--weights", "DIR", Path, "a Qwen2.5-VL", required=True)
    help = "bounds of a picture's area (default: as the judge's files say)"
    add(judged, "--pixels", ("MIN", "MAX"), edit.number(int, 1, 2**31 - 1), help, nargs=2)
    return parser.parse_args(argv)


def main(argv=None):
    """Returns 0, or 1 if a result could not be judged; ends with 2 after one line on a mistake."""
    args = parse(argv)
    try:
        failed = {"rows": write_rows, "judge": judge, "table": table}[args.command](args)
        return 1 if failed else 0
    except (ValueError, OSError) as error:
        edit.Parser(prog="score.py").error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
