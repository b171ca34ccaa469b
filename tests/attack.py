"""Attacks edit.py and train.py from outside with damaged input and kills, and counts what held.

    python tests/attack.py media configs data kills --count 200 --seed 0
    python tests/attack.py media --seed 0 --only 17         # one case again, and all that it said

media damages pictures and clips of every format that edit.py reads, configs the files of a weights
folder, data those of a training. kills ends train.py by signals at random times, and starts it
again until it is done; it has a twentieth of the cases. A case holds if the program does its work,
or ends with code 2 and one line that names a file at fault; within LIMIT seconds and MEMORY bytes,
and with nothing left over. What a case does depends on --seed and its number alone, but for the
times of kills, which are drawn for the speed of the machine.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TOP), str(TOP / "tests")]

from conftest import make_tiny_weights  # before torch: it sets the number of threads

import av
import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from safetensors.torch import load_file, save_file

import edit
import train

LIMIT = 60  # seconds of a case
MEMORY = 2e9  # bytes of its process, the imports of about 0.5e9 included
FRAMES = 5
IMAGES = {"a.png": "RGBA", "b.png": "I;16", "c.jpg": "RGB", "d.jpg": "CMYK", "e.webp": "RGBA"}
IMAGES |= {"f.gif": "P", "g.bmp": "RGB", "h.tiff": "RGB", "i.ppm": "RGB", "j.jp2": "RGB"}
ANIMATIONS = "k.png", "l.webp", "m.gif"
CLIPS = """a.mp4 mp4 libx264 yuv420p aac         b.mov mov prores_ks yuva444p10le pcm_s16le
           c.mkv matroska libx265 yuv420p10le flac   d.webm webm libvpx-vp9 yuva420p libopus
           e.avi avi mpeg4 yuv420p libmp3lame    f.ts mpegts libx264 yuv420p ac3
           g.mpg mpeg mpeg2video yuv420p mp2     h.m2v mpeg2video mpeg2video yuv420p -
           i.m4v m4v mpeg4 yuv420p -             j.flv flv flv yuv420p libmp3lame
           k.ogv ogg libvpx yuv420p libopus      l.wmv asf wmv2 yuv420p wmav2
           m.mxf mxf mpeg2video yuv420p -        n.dv dv dvvideo yuv420p -
           o.h264 h264 libx264 yuv420p -         p.hevc hevc libx265 yuv420p -
           q.ivf ivf libvpx yuv420p -            r.nut nut ffv1 bgr0 pcm_s16le
           s.y4m yuv4mpegpipe rawvideo yuv420p -""".split()
VALUES = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e308, float("nan")]
VALUES += [float("inf"), "", "x", "1", "\ud800", "DEEP", [], [0], [[1]], ["x", None], {}, {"a": 1}]
ENCODINGS = "utf-16", "utf-8-sig", "utf-32", "utf-16-le", "cp1252", "utf-7"
COLUMNS = {"src_video": "source", "tgt_video": "target", "prompt": "instruction"}

Outcome = namedtuple("Outcome", "code lines seconds memory")


# Valid files


def picture(i, size=(48, 32)):
    """A PIL image that moves with i."""
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [128 + 100 * np.sin((x + 3 * i) / 9 + k) * np.cos(y / 7) for k in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def write_images(folder):
    """An image of each format, with EXIF and a color profile where it has room; animations."""
    exif, profile = Image.Exif(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    exif[0x0112], exif[0x010E] = 6, "a wave"
    for name, mode in IMAGES.items():
        image = picture(0).convert("L" if mode == "I;16" else mode).convert(mode)
        image.save(folder / name, exif=exif.tobytes(), icc_profile=profile.tobytes())
    for name in ANIMATIONS:
        first, *others = (picture(i).convert("RGBA") for i in range(FRAMES))
        first.save(folder / name, save_all=True, append_images=others, duration=100)


def write_clip(path, container, codec, layout, sound):
    """A clip of FRAMES frames, with sound unless it is "-"."""
    size = {"dvvideo": (720, 576), "libx265": (128, 96)}.get(codec, (48, 32))
    with av.open(str(path), "w", container) as out:
        options = {"x265-params": "log-level=none:pools=none"} if codec == "libx265" else {}
        track = out.add_stream(codec, 25, options, width=size[0], height=size[1], pix_fmt=layout)
        settings = {"layout": "stereo", "bit_rate": 64_000}
        tone = out.add_stream(sound, 48_000, **settings) if sound != "-" else None
        for i in range(FRAMES):
            out.mux(track.encode(av.VideoFrame.from_image(picture(i, size))))
        out.mux(track.encode(None))
        if tone:
            wave = np.sin(np.arange(9600, dtype=np.float32) / 20)
            frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), "fltp", "stereo")
            frame.sample_rate, frame.pts = 48000, 0
            for piece in (frame, None):
                out.mux(tone.encode(piece))


# Damage


def damage(content, rng, others):
    """Bytes of a file, spoiled in one to three ways; `others` lend their first bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(rng.choice((min(300, len(content)), len(content))) or 1)
        part = slice(start, start + int(2 ** rng.uniform(0, 12)))
        length, way = len(content[part]), rng.randrange(8)
        if way == 0:
            for i in rng.choices(range(start, start + length), k=9 if length else 0):
                content[i] ^= 1 << rng.randrange(8)
        elif way == 1:
            del content[part]
        elif way == 2:
            content[start:start] = content[part]
        elif way == 3:
            del content[start:]
        elif way == 4:
            content[part] = rng.choice((b"\0", b"\xff")) * length
        elif way == 5:
            content[part] = rng.randbytes(length)
        elif way == 6:
            content[: part.stop - start] = rng.choice(others)[: part.stop - start]
        else:
            extreme = rng.choice((0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1))
            content[start : start + 4] = extreme.to_bytes(4, rng.choice(("big", "little")))
    return bytes(content)


def damage_json(text, rng):
    """JSON with one to three values that were replaced, removed, wrapped or renamed."""
    root = [json.loads(text)]
    for _ in range(rng.randint(1, 3)):
        parent, key = root, 0
        while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.9:
            parent = parent[key]
            key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        way = rng.randrange(6)
        if way == 0 and parent is not root:
            del parent[key]
        elif way == 1:
            parent[key] = rng.choice(([parent[key]], {"a": parent[key]}, str(parent[key])))
        elif way == 2 and isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        elif way == 3 and type(parent[key]) in (int, float):
            parent[key] = rng.choice((-1, 0.5, 2, 1000, 10**9)) * parent[key]
        else:
            parent[key] = rng.choice(VALUES)
    return json.dumps(root[0]).replace('"DEEP"', "[" * 10**5)


def damage_safetensors(content, rng, others):
    """A safetensors file whose header of JSON, or whose bytes, are spoiled."""
    if rng.random() < 0.4:
        return damage(content, rng, others)
    end = 8 + int.from_bytes(content[:8], "little")
    header = damage_json(content[8:end], rng).encode()
    return len(header).to_bytes(8, "little") + header + content[end:]


# What a process did


def run(work, log):
    """work() in a forked process -> Outcome. A fork needs no imports, and can be ended."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            with log.open("wb") as stream:
                os.dup2(stream.fileno(), 1), os.dup2(stream.fileno(), 2)
            sys.stdout, sys.stderr = (open(i, "w", errors="replace") for i in (1, 2))
            resource.setrlimit(resource.RLIMIT_DATA, (int(4 * MEMORY),) * 2)
            code = work() or 0
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        seconds = time.monotonic() - began
        if ended:
            break
        if seconds > LIMIT:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Outcome(os.waitstatus_to_exitcode(status), lines, seconds, memory)


def shape_of(path):
    """(frames, height, width) of a result, read to its end by PIL or PyAV."""
    try:
        with Image.open(path) as image:
            for i in range(getattr(image, "n_frames", 1)):
                image.seek(i)
                image.load()
            return i + 1, image.height, image.width
    except UnidentifiedImageError:
        with av.open(str(path)) as clip:
            frames = list(clip.decode(video=0))
            return len(frames), frames[0].height, frames[0].width


class Copy:
    """Stands in for the model: its result is its input."""

    trained = True

    def edit(self, frames, *others):
        for frame in frames:
            others[-1](frame[None])


def edited(source, *options):
    """edit.py's main on a file, and a look at the result."""
    edit.main([str(source), "copy it", "--frames", "20", *map(str, options)])
    [result] = set(source.parent.iterdir()) - {source}
    found, shape = shape_of(result), (len(edit.read_frames(source, 20).frames),)
    shape += edit.media_shape(source)[1:]
    if found != shape:
        raise AssertionError(f"{result} is {found} and should be {shape}")


def trained(arguments, out):
    """train.py's main, and a look at what it left."""
    code = train.main(arguments)
    left = [*out.rglob("*.partial"), *out.rglob("*.old")]
    if left or code == 0 and not (out / "instructx" / "model.safetensors").is_file():
        raise AssertionError(f"instructx/ is missing, or left over are {left}")
    return code


def fault(script, outcome, names):
    """What is wrong with the end of a process, or ""; a refusal must hold one of `names`."""
    code, lines, seconds, memory = outcome
    if code not in (0, 2) or seconds > LIMIT or memory > MEMORY:
        return f"code {code}, {seconds:.0f} s, {memory / 1e9:.1f} GB: {' / '.join(lines[-2:])}"
    if code == 2:
        errors = [line for line in lines if line.startswith(f"{script}: error: ")]
        others = [line for line in lines if not line.startswith(f"{script}: ")]
        if errors != lines[-1:] or others or not any(name in errors[0] for name in names):
            return f"no line that names a file: {' / '.join(lines)}"
    return ""


# The attacks: each makes the files of all cases, and gives what tries one in an empty folder


def media(base):
    """Pictures and clips of every format, edited by a model that returns its input."""
    write_images(base)
    for i in range(0, len(CLIPS), 5):
        write_clip(base / CLIPS[i], *CLIPS[i + 1 : i + 5])
    contents = {file.name: file.read_bytes() for file in sorted(base.iterdir())}

    def attempt(folder, rng):
        name = rng.choice(list(contents))
        source = folder / "in" / name
        source.parent.mkdir()
        source.write_bytes(damage(contents[name], rng, list(contents.values())))

        def work():
            edit.load, edit.DEFAULT_WEIGHTS = (lambda args: (Copy(), "cpu")), folder
            edited(source)

        outcome = run(work, folder / "said")
        left = [file.name for file in source.parent.iterdir() if file != source]
        if outcome.code == 2 and left:
            return outcome, f"left over: {left}"
        return outcome, fault("edit.py", outcome, [name])

    return attempt


def configs(base):
    """The files of a weights folder, two of whose models lie in shards; pictures and clips."""
    make_tiny_weights(base)
    shutil.rmtree(base / "dit")  # instructx/ holds a DiT
    for folder in (base / "mllm", base / "instructx" / "dit"):
        tensors = load_file(folder / "model.safetensors")
        shards = {name: f"{i % 2}.safetensors" for i, name in enumerate(tensors)}
        for shard in set(shards.values()):
            part = {name: tensor for name, tensor in tensors.items() if shards[name] == shard}
            save_file(part, folder / shard, {"format": "pt"})
        (folder / "model.safetensors").unlink()
        index = json.dumps({"weight_map": shards})
        (folder / "model.safetensors.index.json").write_text(index)
    files = sorted(file.relative_to(base) for file in base.rglob("*") if file.is_file())
    contents = {file: (base / file).read_bytes() for file in files}

    def attempt(folder, rng):
        weights, source = folder / "weights", folder / "in" / rng.choice(("a.png", "a.gif"))
        shutil.copytree(base, weights)
        source.parent.mkdir()
        pictures = [picture(i) for i in range(FRAMES if source.suffix == ".gif" else 1)]
        pictures[0].save(source, save_all=True, append_images=pictures[1:])
        file = rng.choice([file for file in files if rng.random() < 0.3 or file.suffix == ".json"])
        spoil = damage_safetensors if file.suffix == ".safetensors" else damage
        if file.suffix == ".json" and rng.random() < 0.8:
            (weights / file).write_text(damage_json(contents[file], rng))
        else:
            content = spoil(contents[file], rng, list(contents.values()))
            (weights / file).write_bytes(content)
        outcome = run(lambda: edited(source, "--weights", weights), folder / "said")
        left = [item.name for item in source.parent.iterdir() if item != source]
        if outcome.code == 2 and left:
            return outcome, f"left over: {left}"
        return outcome, fault("edit.py", outcome, [str(weights), "memory"])

    return attempt


def write_data(folder):
    """Three edits of images and one of clips -> the rows of a data file."""
    rows = []
    for i in range(3):
        for name in (f"{i}s.png", f"{i}t.jpg"):
            picture(i).save(folder / name)
        rows.append({"source": f"{i}s.png", "target": f"{i}t.jpg", "instruction": f"edit {i}"})
    rows[0]["references"] = ["1s.png"]
    for name in ("s.mp4", "t.mp4"):
        write_clip(folder / name, "mp4", "libx264", "yuv420p", "-")
    return [*rows, {"source": "s.mp4", "target": "t.mp4", "instruction": "edit a clip"}]


def command(base, data, out, *more):
    """Arguments of train.py for a small run."""
    line = ["--stage", 2, "--data", data, "--weights", base / "weights", "--out", out]
    line += "--device cpu --image-batch 2 --video-batch 1 --micro-batch 2 --area 1024".split()
    return [*map(str, line), *more]


def data(base):
    """Data files and the media that they name."""
    make_tiny_weights(base / "weights")
    (base / "media").mkdir()
    rows = write_data(base / "media")

    def attempt(folder, rng):
        shutil.copytree(base / "media", folder, dirs_exist_ok=True)
        if rng.random() < 0.3:
            file = folder / rng.choice(sorted(os.listdir(base / "media")))
            file.write_bytes(damage(file.read_bytes(), rng, [b"\x89PNG\r\n\x1a\n"]))
        lines = [json.dumps(row) for row in rows]
        if rng.random() < 0.6:
            i = rng.randrange(len(lines))
            lines[i] = damage_json(lines[i], rng)
        file = folder / "data.jsonl"
        if rng.random() < 0.4:
            file = folder / "data.csv"
            lines = ["src_video,tgt_video,prompt,ref_image"]
            lines += [",".join((row["source"], row["target"], row["instruction"], "")) for row in rows]
        content = "\n".join(lines).encode(rng.choice(ENCODINGS) if rng.random() < 0.2 else "utf-8")
        file.write_bytes(damage(content, rng, [content]) if rng.random() < 0.5 else content)
        arguments = command(base, file, folder / "out", "--steps", "2")
        outcome = run(lambda: trained(arguments, folder / "out"), folder / "said")
        return outcome, fault("train.py", outcome, [file.name])

    return attempt


def kills(base):
    """A training that signals end, started again until it is done, against one in peace."""
    make_tiny_weights(base / "weights")
    file = base / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in write_data(base)))

    def start(out, log):
        more = ("--steps", "60", "--save-every", "5", "--cache", str(out / "cache"))
        line = [sys.executable, TOP / "train.py", *command(base, file, out, *more)]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=log)

    def result(out):
        folder = out / "instructx"
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}

    began, whole = time.monotonic(), base / "out"
    with (base / "said").open("wb") as log:
        process, first = start(whole, log), 0.0
        while process.poll() is None:
            if not first and (whole / "metrics.jsonl").exists():
                first = time.monotonic() - began
            time.sleep(0.01)
    last, expected = time.monotonic() - began, result(whole)

    def attempt(folder, rng):
        out, ends, began = folder / "out", [], time.monotonic()
        while not ends or ends[-1] != 0:
            with (folder / "said").open("ab") as log:
                process, sent = start(out, log), rng.choice(SIGNALS)
                try:
                    code = process.wait(rng.uniform(0.8 * first, last))
                except subprocess.TimeoutExpired:
                    process.send_signal(sent)
                    code = process.wait(LIMIT)
            ends.append(code)
            if code not in (0, -sent, 128 + sent) or len(ends) > 30:
                break
        lines = (folder / "said").read_text().splitlines()
        outcome = Outcome(ends[-1], lines, time.monotonic() - began, 0)
        if ends[-1]:
            return outcome, f"ended with {ends}: {lines[-1:]}"
        left = [str(path) for pattern in ("*.partial", "*.old") for path in out.rglob(pattern)]
        if left or result(out) != expected:
            return outcome, f"after {ends} other weights, or left over: {left}"
        return outcome, ""

    return attempt


SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
ATTACKS = {"media": media, "configs": configs, "data": data, "kills": kills}


def attack(name, numbers, seed, show=False):
    """Tries cases and prints those that did not hold -> (tried, held, refused, seconds)."""
    began, held, refused = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as top:
        base = Path(top) / "base"
        base.mkdir()
        attempt = ATTACKS[name](base)
        for number in numbers:
            folder = Path(top) / "case"
            folder.mkdir()
            outcome, problem = attempt(folder, random.Random(f"{name} {seed} {number}"))
            shutil.rmtree(folder)
            if problem:
                print(f"{name} --seed {seed} --only {number}: {problem}", flush=True)
            held, refused = held + (not problem), refused + (outcome.code == 2)
            if show:
                print(*outcome.lines, sep="\n")
    return len(numbers), held, refused, time.monotonic() - began


def main(arguments=None):
    """Prints a table of all attacks -> 0, or 1 if a case did not hold."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = edit.Parser(prog="attack.py", description=__doc__, formatter_class=raw)
    parser.add_argument("attacks", nargs="+", choices=ATTACKS)
    count = edit.number(int, 0, 10**6)
    parser.add_argument("--count", type=count, default=200, help="cases of each (default: 200)")
    parser.add_argument("--seed", type=count, default=0, help="of all damage (default: 0)")
    parser.add_argument("--only", type=count, metavar="NUMBER", help="try this case alone")
    args = parser.parse_args(arguments)
    rows = {}
    for name in args.attacks:
        number = max(1, args.count // 20) if name == "kills" else args.count
        numbers = range(number) if args.only is None else [args.only]
        rows[name] = attack(name, numbers, args.seed, args.only is not None)
    print(f"{'attack':10}{'tried':>8}{'held':>8}{'refused':>9}{'seconds':>9}")
    for name, (tried, held, refused, seconds) in rows.items():
        print(f"{name:10}{tried:8}{held:8}{refused:9}{seconds:9.0f}")
    return 0 if all(tried == held for tried, held, _, _ in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
