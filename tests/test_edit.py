"""edit.py as a user meets it: what comes out lies on what went in; what cannot be is one line."""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageCms, TiffImagePlugin
from safetensors.torch import load_file, save_file

import edit
from edit import (
    CLIP_OPTIONS,
    IMAGE_OPTIONS,
    Media,
    MediaError,
    image_writer,
    media_shape,
    read_frames,
    write_clip,
)

SCRIPT = Path(edit.__file__)
H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p")


def ffmpeg(*options):
    command = [get_ffmpeg_exe(), "-v", "error", "-y", *map(str, options)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def film(path, *options, size="64x48", rate=25, seconds=1, sound=False):
    """Writes a clip of ffmpeg's test picture."""
    tone = ("-f", "lavfi", "-i", "sine=440") if sound else ()
    picture = ("-f", "lavfi", "-i", f"testsrc=size={size}:rate={rate}")
    ffmpeg(*picture, *tone, "-t", seconds, *(options or H264), path)
    return path


def sounds(path):
    """Of each sound track: (codec, [seconds of each packet], [bytes of each packet])."""
    tracks = []
    with av.open(str(path)) as container:
        for track in container.streams.audio:
            container.seek(0)
            packets = [packet for packet in container.demux(track) if packet.size]
            times = [float(packet.pts * packet.time_base) for packet in packets]
            tracks.append((track.codec_context.name, times, [bytes(packet) for packet in packets]))
    return tracks


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(height, width, frames=None):
    """A picture that survives JPEG and colors at half the resolution; a clip in which it moves."""
    if frames:
        return np.stack([np.roll(smooth(height, width), i, axis=1) for i in range(frames)])
    y, x = np.mgrid[:height, :width]
    wave = 130 + 80 * np.sin(2 * np.pi * x / width)
    waves = [wave + 40 * np.cos(2 * np.pi * y / height + i / 2) for i in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def difference(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).mean()


def run(capsys, *arguments):
    """edit.main in this process -> (exit code, lines of stdout, stderr)."""
    code = 0
    try:
        edit.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


class Negative:
    """Stands in for the model where only the media count: its result is known exactly."""

    trained = True

    def edit(self, frames, instruction, references, steps, guidance, seed, fps, progress, write):
        progress("denoise", 1, 1)
        self.frames = frames
        for start in (0, *range(1, len(frames), 4)):
            write(255 - frames[start : start + (4 if start else 1)])
            progress("decode", start + 1, len(frames))


@pytest.fixture
def negative(monkeypatch, tmp_path):
    model = Negative()
    monkeypatch.setattr(edit, "load", lambda args: (model, "cpu"))
    monkeypatch.setattr(edit, "DEFAULT_WEIGHTS", tmp_path)
    return model


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """64 x 48, ten frames at 30000/1001 per second, with sound."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    options = (*H264, "-movflags", "+faststart")
    return film(path, *options, rate="30000/1001", seconds=0.33366, sound=True)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(smooth(40, 56)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def shell(*arguments, **settings):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **settings)


# With a model


def test_image_from_a_shell(tiny_weights, photo, tmp_path):
    """stdout must be usable in a script: the path and nothing else, in any locale."""
    output = tmp_path / "schön.jpg"
    arguments = (photo, "make it night", "-o", output, "--weights", tiny_weights, "--steps", 2)
    done = shell(*arguments, env={**os.environ, "PYTHONIOENCODING": "ascii"}, encoding="utf-8")
    assert done.returncode == 0 and done.stdout == f"{output}\n", done.stderr
    assert Image.open(output).size == (56, 40) and Image.open(output).format == "JPEG"
    rows = [line.split() for line in done.stderr.splitlines()]
    phases = ["phase", "load", "understand", "encode", "denoise", "decode", "total"]
    assert [row[0] for row in rows] == phases
    assert all(float(row[2]) > 0.01 for row in rows[1:])  # GB; torch alone takes more


def test_clip_with_sound(tiny_weights, clip, tmp_path, capsys):
    """Wrong rates and lost sound are what users of other editors complain of most."""
    output = tmp_path / "out.mp4"
    arguments = (clip, "make it night", "-o", output, "--weights", tiny_weights, "--steps", 1)
    code, out, err = run(capsys, *arguments)
    source, result = read_frames(clip), read_frames(output)
    assert code == 0 and out == [str(output)] and "frames;" not in err
    assert result.frames.shape == source.frames.shape == (10, 48, 64, 3)
    assert result.fps == source.fps == Fraction(30000, 1001)
    assert sounds(output) == sounds(clip)  # copied, not coded anew


def test_references_and_options_reach_the_model(tiny_weights, photo, tmp_path, capsys):
    """An option that is accepted and ignored shows as the same file."""
    Image.fromarray(noise(24, 40, 3)).save(tmp_path / "a.png")
    Image.fromarray(noise(33, 17, 3, seed=1)).save(tmp_path / "b.png")
    shutil.copytree(tiny_weights / "instructx", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"shift": 9.0}))
    one = ("--ref", tmp_path / "a.png")
    variants = [(), one, (*one, "--ref", tmp_path / "b.png"), ("--seed", 1), ("--guidance", 1)]
    variants += [("--steps", 4), ("--dtype", "bfloat16"), ("--size", "48x40"), ("--area", 1000)]
    variants += [("--instructx", tmp_path / "other")]
    files, output = set(), tmp_path / "out.png"
    common = ("-o", output, "--weights", tiny_weights, "--steps", 3)
    for extra in variants:
        code, _, err = run(capsys, photo, "add this", *common, *extra)
        assert code == 0, err
        files.add(output.read_bytes())
    assert len(files) == len(variants)
    run(capsys, photo, "remove that", *common)
    assert output.read_bytes() not in files


@pytest.mark.parametrize("name", ["out.png", "out.mp4", "out.mkv", "out.webm", "out.gif"])
def test_same_seed_same_bytes(tiny_weights, photo, clip, tmp_path, name, capsys):
    """Version numbers, dates or random ids in a file would make results impossible to compare."""
    source = photo if name == "out.png" else clip
    files = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        options = ("--weights", tiny_weights, "--steps", 1, "--frames", 5)
        assert run(capsys, source, "make it night", "-o", folder / name, *options)[0] == 0
        files.append((folder / name).read_bytes())
    assert files[0] == files[1]


def test_untrained_weights_are_announced(tiny_weights, photo, tmp_path, capsys):
    """With random queries the result is no edit, which nobody would guess from looking at it."""
    for part in ("mllm", "dit", "vae"):
        shutil.copytree(tiny_weights / part, tmp_path / "weights" / part)
    options = ("-o", tmp_path / "out.png", "--weights", tmp_path / "weights", "--steps", 1)
    code, _, err = run(capsys, photo, "x", *options)
    assert code == 0 and "random" in err


def remove(name):
    return lambda folder: (folder / name).unlink()


def shorten(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def overwrite(name, text):
    return lambda folder: (folder / name).write_text(text)


def rename_token(folder):
    """The tokenizer of another model has numbers that this one's embedding has not."""
    file = folder / "mllm" / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["model"]["vocab"]["zzz"] = 100_000
    file.write_text(json.dumps(raw))


def in_place_of_a_file(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def change(model, function, value, prefix=""):
    def damage(folder):
        file = folder / model / "model.safetensors"
        tensors = load_file(file)
        for name in [name for name in tensors if name.startswith(prefix)]:
            tensors[name] = function(tensors[name], value)
        save_file(tensors, file)

    return damage


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: shutil.rmtree(folder / "mllm"), "mllm"),
        (lambda folder: shutil.rmtree(folder / "vae"), "vae"),
        (remove("mllm/tokenizer.json"), "tokenizer.json"),
        (remove("instructx/model.safetensors"), "instructx/model.safetensors"),
        (remove("instructx/config.json"), "instructx"),
        (shorten("mllm/model.safetensors"), "mllm"),
        (shorten("vae/model.safetensors"), "vae"),
        (shorten("instructx/model.safetensors"), "instructx"),
        (overwrite("instructx/config.json", "[]"), "instructx"),
        (overwrite("instructx/config.json", '{"lora": 3}'), "lora"),
        (overwrite("instructx/config.json", '{"area": -5}'), "instructx/config.json"),
        (overwrite("vae/config.json", "[]"), "vae"),
        (overwrite("mllm/config.json", "not json"), "mllm/config.json"),
        (overwrite("vae/config.json", '{"temperal_downsample": [{}, true, true]}'), "temporal"),
        (rename_token, "tokenizer.json"),
        (overwrite("mllm/preprocessor_config.json", '{"image_mean": [{}, 0, 0]}'), "preprocessor"),
        (overwrite("mllm/preprocessor_config.json", '{"image_std": [0, 1, 1]}'), "image_std"),
        (in_place_of_a_file("mllm/model.safetensors"), "mllm/model.safetensors"),
        (in_place_of_a_file("instructx/dit/model.safetensors"), "dit/model.safetensors"),
        (change("mllm", torch.Tensor.to, torch.float8_e4m3fn), "float8"),
        (change("vae", torch.Tensor.to, torch.float8_e4m3fn), "16 bits or more"),
        (change("instructx", torch.Tensor.to, torch.int32), "int32"),
        (change("vae", torch.mul, math.inf, "decoder.head"), "not finite"),
    ],
)
def test_bad_weights_are_one_clear_line(damage, said, tiny_weights, photo, tmp_path, capsys):
    """An interrupted download is common; it must not be a traceback or a random model."""
    shutil.copytree(tiny_weights, tmp_path / "weights")
    damage(tmp_path / "weights")
    options = ("-o", tmp_path / "out.png", "--weights", tmp_path / "weights")
    code, out, err = run(capsys, photo, "x", *options)
    assert code == 2 and not out and not (tmp_path / "out.png").exists()
    assert err.startswith("edit.py: error: ") and err.count("\n") == 1 and said in err, err


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_device_that_is_not_there(device, tiny_weights, photo, tmp_path, capsys):
    """Torch's own words for this run over many lines."""
    options = ("-o", tmp_path / "o.png", "--weights", tiny_weights, "--device", device)
    code, _, err = run(capsys, photo, "x", *options)
    assert code == 2 and err.count("\n") == 1 and f"--device {device} is not available" in err


@pytest.mark.parametrize(
    "number, code, said",
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "terminated"),
    ],
)
def test_interrupt_leaves_nothing(tiny_weights, clip, tmp_path, number, code, said):
    """Ctrl-C, `timeout`, a closed terminal: no traceback, a usual code, the old file as it was."""
    output = tmp_path / "out.mp4"
    output.write_bytes(b"the result of an earlier run")
    options = ("-o", output, "--frames", "9", "--weights", tiny_weights, "--steps", "1000")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, clip, "x", *options],
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # which a shell may ignore
    )
    assert "has 10 frames" in process.stderr.readline()  # from here on it works for a minute
    time.sleep(1)
    assert len(os.listdir(tmp_path)) == 2
    process.send_signal(number)
    assert (process.wait(30), process.stderr.read()) == (code, f"edit.py: {said}\n")
    assert os.listdir(tmp_path) == ["out.mp4"]
    assert output.read_bytes() == b"the result of an earlier run"


def test_swallowed_signals(negative, photo, tmp_path, capsys):
    """As by safetensors, which asks a tensor for its shape and makes a ValueError of any error."""
    ways = [lambda *arguments: arguments[-2]("denoise", 1, 2), lambda *_: int("no shape")]

    def swallow(*arguments):
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        ways.pop()(*arguments)

    negative.edit = swallow
    for _ in list(ways):
        code, out, err = run(capsys, photo, "x", "-o", tmp_path / "out.png", "--weights", tmp_path)
        assert (code, out, err) == (143, [], "edit.py: terminated\n")
        assert os.listdir(tmp_path) == ["photo.png"]


def test_a_file_in_the_place_of_a_folder(negative, photo, tmp_path, capsys):
    """Not the system's words for a temporary file that nobody has asked for."""
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "out.png"
    code, _, err = run(capsys, photo, "x", "-o", output, "--weights", tmp_path)
    assert code == 2 and err == f"edit.py: error: {output} cannot be written (Not a directory)\n"


@pytest.mark.parametrize("suffix", CLIP_OPTIONS)
def test_an_error_inside_an_edit_is_the_one_reported(negative, clip, tmp_path, capsys, suffix):
    """A GIF without frames cannot be closed either, which hid what was wrong with the weights."""

    def fail(*_):
        raise ValueError("these weights are damaged")

    negative.edit, output = fail, tmp_path / f"out{suffix}"
    code, _, err = run(capsys, clip, "x", "-o", output, "--weights", tmp_path)
    assert code == 2 and err.endswith("edit.py: error: these weights are damaged\n")
    assert not list(tmp_path.iterdir())


# The terminal


def test_bad_options_are_told_before_torch_is_loaded(tmp_path):
    """Seconds of imports before "no such file" are what one import at the top would bring back."""
    code = "import sys, edit\ntry: edit.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    for arguments in (["--help"], ["missing.png", "x", "-o", "out.png", "--weights", tmp_path]):
        command = [sys.executable, "-c", code, *arguments]
        assert subprocess.run(command, cwd=SCRIPT.parent, capture_output=True).returncode == 0
    text = shell("--help").stdout
    options = set(re.findall(r"^  (?:-o PATH, )?--(\w+)", text, re.MULTILINE))
    plain = {"ref", "instructx", "compare", "compile", "offload", "quantize", "tile"}
    plain |= {"batch", "shard", "overlap", "progress"}
    assert len(options) == 21 and text.count("(default:") == len(options - plain)


def test_output_has_a_name_by_default(negative, photo, clip, tmp_path, capsys):
    """Nobody should have to invent a name, or lose a result to one that nobody gave."""
    code, out, _ = run(capsys, photo, "x", "--compare", "--weights", tmp_path)
    names = [str(tmp_path / name) for name in ("photo-edited.png", "photo-edited_compare.png")]
    assert code == 0 and out == names
    code, _, err = run(capsys, photo, "x", "--weights", tmp_path)
    assert code == 2 and "photo-edited.png exists" in err and err.count("\n") == 1
    os.remove(names[0])
    code, _, err = run(capsys, photo, "x", "--compare", "--weights", tmp_path)
    assert code == 2 and "photo-edited_compare.png exists" in err
    assert run(capsys, photo, "x", "-o", names[0], "--weights", tmp_path)[0] == 0
    ffmpeg("-i", clip, "-c", "copy", tmp_path / "film.ts")
    Image.open(photo).save(tmp_path / "scan.tif")
    for source, name in (("film.ts", "film-edited.mp4"), ("scan.tif", "scan-edited.png")):
        code, out, _ = run(capsys, tmp_path / source, "x", "--weights", tmp_path)
        assert code == 0 and out == [str(tmp_path / name)]


def test_large_inputs_are_edited_small(negative, photo, clip, tmp_path, capsys):
    """Weights trained at one area take hours, or fail, at ten times of it."""
    (tmp_path / "instructx").mkdir()
    config = {"_class_name": "InstructX", "area": 20 * 28}
    (tmp_path / "instructx" / "config.json").write_text(json.dumps(config))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    output = tmp_path / "out.png"
    code, _, err = run(capsys, photo, "x", "-o", output, "--weights", tmp_path)
    assert code == 0 and negative.frames.shape == (1, 16, 24, 3)
    assert Image.open(output).size == (56, 40) and "24x16 and scaled back to 56x40" in err
    assert difference(Image.open(output), 255 - smooth(40, 56)) < 2
    run(capsys, photo, "x", "-o", output, "--weights", tmp_path, "--area", 10**6)
    assert negative.frames.shape == (1, 40, 56, 3)
    output = tmp_path / "out.mp4"
    run(capsys, clip, "x", "-o", output, "--weights", tmp_path, "--compare")
    assert read_frames(output).frames.shape == (10, 48, 64, 3)
    assert read_frames(tmp_path / "out_compare.mp4").frames.shape == (10, 48, 128, 3)


def test_progress_without_a_terminal(negative, photo, tmp_path, capsys, monkeypatch):
    """An hour of silence in a log looks like a hang."""
    monkeypatch.setattr(edit, "REPORT_EVERY", -1)
    _, _, err = run(capsys, photo, "x", "-o", tmp_path / "out.png", "--weights", tmp_path)
    assert re.search(r"^edit.py: denoise 1 of 1 after \d+ s$", err, re.MULTILINE)


def test_files_have_the_usual_permissions(negative, photo, clip, tmp_path, capsys):
    """A private mode hides results from everybody else who shares the folder."""
    before = os.umask(0o022)
    try:
        for source, name in ((photo, "a.png"), (clip, "a.mp4")):
            run(capsys, source, "x", "-o", tmp_path / name, "--weights", tmp_path)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o644
        with edit.whole(tmp_path / "private") as unfinished:
            unfinished.unlink()
            os.close(os.open(unfinished, os.O_CREAT, 0o600))  # as safetensors does
        assert (tmp_path / "private").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_links_are_followed_and_leftovers_removed(negative, photo, tmp_path, capsys):
    """A result in the place of a link leaves its file; what kill -9 left would stay for good."""
    (tmp_path / "store").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "store" / "real.png")
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    with edit.whole(tmp_path / "link.png") as unfinished:
        unfinished.write_bytes(photo.read_bytes())
        name = unfinished.name
    stale = name.replace(str(os.getpid()), ended.stdout.decode().strip())
    (tmp_path / stale).touch()
    running = name.replace(str(os.getpid()), "1")
    (tmp_path / running).touch()
    options = ("-o", tmp_path / "link.png", "--weights", tmp_path)
    assert run(capsys, photo, "x", *options)[0] == 0
    assert (tmp_path / "link.png").is_symlink() and Image.open(tmp_path / "store" / "real.png")
    assert {*os.listdir(tmp_path)} == {"store", "link.png", "photo.png", running}


def text(path):
    path.write_text("no picture at all\n" * 100)


def playlist(path):
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n")


def png(height, width):
    return lambda path: Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path, "PNG")


def cut_image(format):
    def write(path):
        Image.fromarray(noise(64, 64, 3)).save(path, format)
        path.write_bytes(path.read_bytes()[:-3000])

    return write


def cut_clip(container, *options):
    def write(path):
        film(path, *H264, *options, "-f", container)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])

    return write


def raw(**tags):
    def write(path):
        info = TiffImagePlugin.ImageFileDirectory_v2()
        for name, value in tags.items():
            info[int(name[1:])] = value
            info.tagtype[int(name[1:])] = 1 if isinstance(value, bytes) else 4
        Image.new("RGB", (64, 48)).save(path, "TIFF", tiffinfo=info)

    return write


def animation(path):
    frames = [Image.fromarray(noise(32, 32, 3, seed=i)) for i in range(3)]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


def header_of_heic(path):
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))


def trained_folder(path):
    path.mkdir()
    (path / "config.json").write_text('{"_class_name": "InstructX"}')


FINE = png(32, 32)
NEITHER = "neither an image nor a video"
BAD = {  # name: (input, arguments, what must be said)
    "missing input": (None, [], "there is no file input.png; images or videos come first"),
    "empty file": (lambda path: path.touch(), [], NEITHER),
    "text": (text, [], NEITHER),
    "no frame in it": (lambda path: film(path, *H264, "-t", 0, "-f", "mp4"), [], NEITHER),
    "900 million pixels": (
        lambda path: Image.new("1", (30000, 30000)).save(path),
        [],
        "178956970 pixels",
    ),
    "playlist": (playlist, [], NEITHER),
    "sound": (
        lambda path: ffmpeg("-f", "lavfi", "-i", "sine", "-t", 1, "-f", "mp4", path),
        [],
        NEITHER,
    ),
    "folder": (lambda path: path.mkdir(), [], r"input.png is a folder; .* input.png/\*.jpg"),
    "pipe": (lambda path: os.mkfifo(path), [], "there is no file"),
    "truncated PNG": (cut_image("PNG"), [], "truncated"),
    "truncated JPEG": (cut_image("JPEG"), [], "truncated"),
    "truncated WebP": (cut_image("WEBP"), [], "truncated|neither"),
    "truncated MP4": (cut_clip("mp4"), [], "damaged"),
    "truncated MP4 that starts well": (cut_clip("mp4", "-movflags", "+faststart"), [], "truncated"),
    "truncated MKV": (cut_clip("matroska"), [], "truncated"),
    "HEIC": (header_of_heic, [], "HEIC.* convert"),
    "DNG": (raw(t50706=b"\1\4\0\0"), [], "camera raw.* convert"),
    "preview of a NEF": (raw(t254=1), [], "camera raw.* convert"),
    "1x1": (png(1, 1), [], "too small.* 16"),
    "narrow": (png(16, 3200), [], "narrow.* 200 times"),
    "panorama": (png(500, 20000), [], r"20000x500 is .*large.* 8191 .*--size WxH or --area"),
    "large": (png(4200, 4200), [], r"large.* 16777216 in all"),
    "size too small": (FINE, ["--size", "8x8"], "too small"),
    "size too large": (FINE, ["--size", "9000x100"], "9000x100 is .*large"),
    "size of another form": (FINE, ["--size", "832"], "'832' is not a size such as 832x480"),
    "no frames": (FINE, ["--frames", "0"], "'0' is not a whole number from 1"),
    "steps 2.5": (FINE, ["--steps", "2.5"], "--steps.*whole number"),
    "guidance NaN": (FINE, ["--guidance", "nan"], "--guidance.*'nan' is not a number from 1"),
    "guidance infinite": (FINE, ["--guidance", "inf"], "--guidance"),
    "seed negative": (FINE, ["--seed", "-1"], "--seed"),
    "option unknown": (FINE, ["--negative", "x"], "--negative"),
    "empty instruction": (FINE, ["  "], "instruction is empty"),
    "no quotes": (FINE, ["make", "it", "night"], "no file make; .*in quotes"),
    "several files": (
        FINE,
        ["taken.txt", "make it night"],
        "out.png is no folder; several edits need one",
    ),
    "several files and no instruction": (
        FINE,
        ["taken.txt"],
        "taken.txt is a file or a folder; the",
    ),
    "input alone": (FINE, [], "expected INPUT"),
    "share of one edit": (FINE, ["--shard", "0/2"], "--shard is for several"),
    "share that is none": (FINE, ["--shard", "2/2"], "'2/2' is not a share such as 0/4"),
    "batch and input": (FINE, ["--batch", "taken.txt"], "no use for input.png"),
    "swapped": (
        None,
        ["taken.txt"],
        "there is no file input.png; .* first, and then the instruction",
    ),
    "reference is a clip": (FINE, ["--ref", animation], "is a clip"),
    "reference is a folder": (FINE, ["--ref", lambda path: path.mkdir()], "folder"),
    "reference is text": (FINE, ["--ref", text], "neither"),
    "reference is missing": (FINE, ["--ref", "missing.png"], "there is no file missing.png"),
    "reference too small": (FINE, ["--ref", png(2, 2)], "too small"),
    "no weights": (FINE, ["--weights", "nowhere"], "nowhere: there is no such folder"),
    "no trained folder": (FINE, ["--instructx", "nowhere"], "nowhere: there is no such folder"),
    "trained folder as weights": (FINE, ["--weights", trained_folder], "use --instructx"),
    "extension unknown": (
        FINE,
        ["-o", "out.xyz"],
        r"no known extension of an image; known are .png .jpg",
    ),
    "no extension": (FINE, ["-o", "out"], "no known extension"),
    "image to a clip": (
        FINE,
        ["-o", "out.mp4"],
        r"out.mp4 has no known extension of an image; known are .png .jpg",
    ),
    "clip to an image": (
        animation,
        ["-o", "out.jpg"],
        r"out.jpg has no known extension of a clip; known are .mp4",
    ),
    "output folder missing": (FINE, ["-o", "no/such/out.png"], "no/such/out.png cannot be written"),
    "output folder read-only": (FINE, ["-o", "/proc/out.png"], "/proc/out.png cannot be written"),
    "output name too long": (FINE, ["-o", "a" * 252 + ".png"], "too long"),
    "output is the input": (FINE, ["-o", "input.png"], "input.png is an input"),
    "URL": (None, [], "there is no file https:/example.org/a.png"),
}
PLACES = ("empty instruction", "no quotes", "several files", "swapped")
PLACES += ("several files and no instruction", "input alone")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, monkeypatch, tmp_path, capsys):
    """A traceback, a usage page or half a file instead of the reason; or only after the work."""
    make, arguments, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edit, "load", lambda args: pytest.fail("the model should not be loaded"))
    Path("taken.png").mkdir()
    Path("taken.txt").touch()
    if make:
        make(Path("input.png"))
    words = [
        word if isinstance(word, str) else word(Path("extra")) or "extra" for word in arguments
    ]
    instruction, options = (words, []) if case in PLACES else (["make it night"], words)
    before = set(tmp_path.rglob("*"))
    name = "https://example.org/a.png" if case == "URL" else "input.png"
    usual = ("-o", "out.png", "--weights", tmp_path)
    code, out, err = run(capsys, name, *instruction, *usual, *options)
    assert code == 2 and not out
    assert err.startswith("edit.py: error: ") and err.count("\n") == 1 and re.search(said, err), err
    assert set(tmp_path.rglob("*")) == before


def test_no_input_is_lost(negative, tmp_path, capsys):
    """A reference, or an input with the name of --compare's file, must not be written over."""
    for name in ("a.png", "b.png", "b_compare.png"):
        FINE(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    a, b, compared = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "b_compare.png"
    for arguments, said in (
        ((a, "x", "-o", b, "--ref", b), "b.png is an input"),
        ((compared, "x", "-o", b, "--compare"), "b_compare.png is an input"),
        ((a, "x", "-o", tmp_path / "pipe.png"), "pipe.png is a folder or a device"),
    ):
        code, out, err = run(capsys, *arguments, "--weights", tmp_path)
        assert code == 2 and not out and err.count("\n") == 1 and said in err
    assert {Image.open(path).size for path in (a, b, compared)} == {(32, 32)}


# Many edits


def write_rows(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def contents(folder):
    """{name: bytes} of all files but .made.jsonl, whose order is that of the work."""
    files = [file for file in folder.rglob("*.*") if file.name != ".made.jsonl"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def rows(tmp_path):
    """A folder with three pictures and seven rows, of which three are bad."""
    for i, size in enumerate([(56, 40), (33, 70), (64, 64)]):
        Image.fromarray(smooth(*size)).save(tmp_path / f"{i}.png")
    return write_rows(
        tmp_path / "rows.jsonl",
        {"source": "0.png", "instruction": "make it night", "target": "unused", "kind": "tone"},
        '{"source": "0.png", "instr',
        {"source": "1.png", "instruction": "x", "output": "sub/one.jpg", "seed": 7},
        {"source": "missing.png", "instruction": "x"},
        {"source": "1.png", "instruction": "x", "references": ["2.png"]},
        {"source": "rows.jsonl", "instruction": "x"},
        {"source": "2.png", "instruction": "x", "output": "two.png"},
    )


def test_one_bad_row_does_not_end_the_night(tiny_weights, rows, tmp_path, capsys):
    """All others are made, each bad one is named in a line, and the same command tries it again."""
    out = tmp_path / "out"
    command = ("--batch", rows, "-o", out, "--weights", tiny_weights)
    code, made, err = run(capsys, *command)
    names = ["0.png", "sub/one.jpg", "1.png", "two.png"]
    assert code == 1 and made == [str(out / name) for name in names]
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == 3 and "4 made" in err and "0 kept, 3 failed" in err
    for number, line in zip((2, 4, 6), errors):
        assert line.startswith(f"edit.py: error: {rows}:{number}: ")
    before = contents(out)
    Image.fromarray(smooth(40, 40)).save(tmp_path / "missing.png")
    code, made, err = run(capsys, *command)
    assert code == 1 and made == [str(out / "missing.png")] and "1 made" in err and "4 kept" in err
    assert {name: contents(out)[name] for name in before} == before
    assert not [name for name in contents(out) if "partial" in name]


def test_a_row_alone_equals_the_row_among_others(tiny_weights, rows, tmp_path, capsys):
    """Order, shards, resuming, and one edit by itself: the same bytes."""
    usual = ("--weights", tiny_weights, "--seed", 5)
    run(capsys, "--batch", rows, "-o", tmp_path / "a", *usual)
    whole = contents(tmp_path / "a")
    assert len(whole) == 5
    for i in range(2):
        shard = ("--shard", f"{i}/2")
        code, _, err = run(capsys, "--batch", rows, "-o", tmp_path / "b", *shard, *usual)
        assert code == i and err.count("error") == 3 * i  # the bad ones are the 2nd, 4th and 6th
    assert contents(tmp_path / "b") == whole
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines[::-1]))
    (tmp_path / "b" / "two.png").unlink()
    run(capsys, "--batch", rows, "-o", tmp_path / "b", *usual)
    assert contents(tmp_path / "b") == whole
    one = tmp_path / "one.jpg"
    run(capsys, tmp_path / "1.png", "x", "-o", one, "--weights", tiny_weights, "--seed", 7)
    assert one.read_bytes() == whole["sub/one.jpg"]


def test_killed_in_the_middle(tiny_weights, rows, tmp_path):
    """kill -9 leaves whole results alone, which the next run keeps."""
    command = [sys.executable, SCRIPT, "--batch", rows, "--weights", tiny_weights, "--steps", "300"]
    subprocess.run([*command, "-o", tmp_path / "a"], capture_output=True)
    process = subprocess.Popen([*command, "-o", tmp_path / "b"], stdout=-1, stderr=-1)
    process.stdout.readline()  # the first result is there
    time.sleep(0.05)
    process.kill()
    process.communicate()
    left = {path.name for path in (tmp_path / "b").rglob("*.*")}
    assert {"0.png", "settings.json"} <= left and "two.png" not in left
    ended = subprocess.run([*command, "-o", tmp_path / "b"], capture_output=True, text=True)
    assert ended.returncode == 1 and "0 kept" not in ended.stderr
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_several_inputs_as_cp_takes_them(negative, photo, clip, tmp_path, capsys, monkeypatch):
    """A folder of photos of several sizes, a clip among them: each keeps its name and its size."""
    loads = []
    monkeypatch.setattr(edit, "load", lambda args: loads.append(1) or (negative, "cpu"))
    Image.fromarray(smooth(30, 20)).save(tmp_path / "b.jpg")
    Image.fromarray(smooth(64, 64)).save(tmp_path / "b.tif")
    text(tmp_path / "notes.png")
    inputs = [photo, tmp_path / "b.jpg", clip, tmp_path / "notes.png", tmp_path / "b.tif"]
    command = (*inputs, "x", "-o", tmp_path / "out", "--weights", tmp_path, "--compare")
    code, out, err = run(capsys, *command)
    assert code == 1 and err.count("error") == 1 and "notes.png is neither" in err
    names = ["photo.png", "b.jpg", "clip.mp4", "b.png"]
    assert out[::2] == [str(tmp_path / "out" / name) for name in names] and loads == [1]
    assert Image.open(tmp_path / "out" / "b.jpg").size == (20, 30)
    assert Image.open(tmp_path / "out" / "b_compare.jpg").size == (40, 30)
    assert read_frames(tmp_path / "out" / "clip.mp4").frames.shape == (10, 48, 64, 3)
    code, out, err = run(capsys, *command)
    assert code == 1 and not out and "0 made, 4 kept, 1 failed" in err and loads == [1]
    (tmp_path / "there").mkdir()
    code, out, _ = run(capsys, photo, "x", "-o", tmp_path / "there", "--weights", tmp_path)
    assert code == 0 and out == [str(tmp_path / "there" / "photo.png")]


def test_a_result_that_is_there_is_left_alone(negative, rows, tmp_path, capsys):
    """Also with --compare, whose second file is missing; and nothing joins a folder of frames."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.png").write_bytes(b"anything")
    command = (tmp_path / "0.png", "x", "-o", tmp_path / "out", "--weights", tmp_path, "--compare")
    code, out, err = run(capsys, *command)
    assert code == 0 and not out and "1 kept" in err
    assert contents(tmp_path / "out") == {"0.png": b"anything"}
    (tmp_path / "frames").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "frames" / "0.png")
    write_rows(rows, {"source": "frames", "instruction": "x", "output": "frames/a.mp4"})
    code, _, err = run(capsys, "--batch", rows, "-o", tmp_path, "--weights", tmp_path)
    assert code == 1 and "would become a frame of an input" in err


def test_a_row_that_was_changed(negative, rows, tmp_path, monkeypatch, capsys):
    """The result of the old words must not pass for that of the new ones."""
    row, command = {"source": "0.png", "instruction": "make it night"}, ("--weights", tmp_path)
    command = ("--batch", rows, "-o", tmp_path / "out", *command)
    write_rows(rows, row)
    assert run(capsys, *command)[0] == 0 == run(capsys, *command)[0]
    before = contents(tmp_path / "out")
    for change in ({"instruction": "y"}, {"seed": 3}, {"references": ["1.png"]}):
        write_rows(rows, row | change)
        code, out, err = run(capsys, *command)
        assert code == 1 and not out and f"another row ({[*change][0]} was" in err
    write_rows(rows, {"source": "1.png", "instruction": "make it night", "output": "0.png"})
    code, _, err = run(capsys, *command)
    assert code == 1 and "(source was" in err and contents(tmp_path / "out") == before
    (tmp_path / "out" / "0.png").unlink()

    def load(args):  # another process makes it in the meantime
        (tmp_path / "out" / "0.png").write_bytes(before["0.png"])
        return negative, "cpu"

    monkeypatch.setattr(edit, "load", load)
    code, out, err = run(capsys, *command)
    assert code == 0 and not out and "0 made, 1 kept, 0 failed" in err
    monkeypatch.setattr(edit, "load", lambda args: (negative, "cpu"))
    (tmp_path / "out" / "0.png").unlink()
    with (tmp_path / "out" / ".made.jsonl").open("a") as file:
        file.write("[]\n{half")
    assert run(capsys, *command)[0] == 0 == run(capsys, *command)[0]


def test_h264_is_the_same_whatever_was_written_before(tmp_path):
    """Results of a run would depend on the order of its rows, or on where it was stopped."""
    clips = [smooth(h, w, 25) for h, w in ((48, 64), (64, 64), (100, 130), (320, 240))]
    files = [[] for _ in clips]
    for turn in range(8):
        for i in np.random.default_rng(turn).permutation(len(clips)):
            write_clip(tmp_path / "a.mp4", clips[i], 25)
            files[i].append((tmp_path / "a.mp4").read_bytes())
    assert [len(set(versions)) for versions in files] == [1, 1, 1, 1]


def test_other_settings_are_refused(negative, photo, tmp_path, capsys, monkeypatch):
    """Half of a folder by one rule and half by another; or all kept, as if the new one was met."""
    out = tmp_path / "out"
    command = (photo, "x", "-o", f"{out}/", "--weights", tmp_path)
    assert run(capsys, *command, "--steps", "3")[0] == 0
    before = contents(out)
    assert run(capsys, *command, "--steps", "3", "--device", "cpu")[0] == 0
    for more, said in (
        (["--steps", "4"], "steps was 3 and is 4"),
        (["--steps", "3", "--ref", photo], "ref was"),
        (["--steps", "3", "--size", "32x32"], "size was None"),
    ):
        code, printed, err = run(capsys, *command, *more)
        assert code == 2 and not printed and err.count("\n") == 1 and said in err
    code, _, err = run(capsys, photo, "y", "-o", out, "--weights", tmp_path, "--steps", "3")
    assert code == 2 and "instruction was 'x' and is 'y'" in err
    assert contents(out) == before
    code, _, err = run(capsys, "--batch", write_rows(tmp_path / "r.jsonl", {}), *command[2:])
    assert code == 2 and "instruction was 'x' and is ''" in err
    (out / "settings.json").write_text("{")
    code, _, err = run(capsys, *command, "--steps", "3")
    assert code == 2 and "settings.json cannot be read" in err

    def other(args):  # another process writes its own in the meantime
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "settings.json").write_text(before["settings.json"].decode())
        return negative, "cpu"

    monkeypatch.setattr(edit, "load", other)
    new = ("-o", f"{tmp_path}/new/", "--weights", tmp_path)
    code, _, err = run(capsys, photo, "y", *new, "--steps", "3")
    assert (
        code == 2
        and "instruction was 'x'" in err
        and {*contents(tmp_path / "new")} == {"settings.json"}
    )
    shutil.rmtree(tmp_path / "new")
    monkeypatch.setattr(edit, "load", lambda args: int("bad weights"))
    code, _, err = run(capsys, photo, "x", "-o", f"{tmp_path}/new/", "--weights", tmp_path)
    assert code == 2 and "bad weights" in err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "row, said",
    [
        ({"source": "0.png", "instruction": "y"}, "0.png is the result of .*:1 already"),
        ({"source": "1.png", "instruction": " "}, "instruction is empty"),
        ({"source": "1.png", "instruction": "y", "output": "../1.jpg"}, "not a file inside of"),
        ({"source": "1.png", "instruction": "y", "output": "/tmp/1.jpg"}, "relative to"),
        ({"source": "1.png", "instruction": "y", "output": ["a"]}, "not a file inside of"),
        ({"source": "1.png", "instruction": "y", "output": "a.mp4"}, "extension of an image"),
        ({"source": "1.png", "instruction": "y", "seed": -1}, "seed -1 is not a whole number"),
        ({"source": "1.png", "instruction": "y", "seed": True}, "seed True"),
        ({"source": "1.png", "instruction": "y", "references": "a.png"}, "references are no list"),
        ({"source": "1.png", "instruction": "y", "references": ["no.png"]}, "no file .*no.png"),
        ({"source": "", "instruction": "y"}, "a path is empty"),
        ({"source": "\ud800.png", "instruction": "y"}, "not an edit"),
        ({"source": "a\0.png", "instruction": "y"}, "zero byte"),
        ({"source": "1.png", "instruction": "y" + "\ud800" * 9000}, "not an edit"),
        ({"instruction": "y"}, "source"),
        ([1], "not an edit"),
        ("[" * 100000, "not an edit"),
    ],
)
def test_bad_rows_are_named(negative, rows, tmp_path, row, said, capsys):
    """Rows are written by other programs. None may reach files outside, or win over another."""
    write_rows(rows, {"source": "0.png", "instruction": "x"}, row)
    before = contents(tmp_path)
    code, _, err = run(capsys, "--batch", rows, "-o", tmp_path / "out", "--weights", tmp_path)
    [line] = [line for line in err.splitlines() if "error" in line]
    assert code == 1 and line.startswith(f"edit.py: error: {rows}:2: ") and re.search(said, line)
    assert len(line) < 1000
    assert {*contents(tmp_path)} - {*before} == {"out/settings.json", "out/0.png"}


def test_a_row_of_training_data(negative, clip, tmp_path, capsys):
    """Clips as folders of frames, which train.py reads; they have no name with an extension."""
    frames = read_frames(clip).frames
    (tmp_path / "clip.v2").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "clip.v2" / f"{i}.png")
    row = {"source": "clip.v2", "target": "missing", "instruction": "x"}
    rows = write_rows(tmp_path / "rows.jsonl", row)
    command = ("--batch", rows, "-o", tmp_path / "out", "--weights", tmp_path)
    code, out, _ = run(capsys, *command)
    assert code == 0 and out == [str(tmp_path / "out" / "clip.v2.mp4")]
    result = read_frames(out[0])
    assert result.fps == 16 and difference(result.frames, 255 - frames) < 6
    model = Windows()
    model.calls, model.level = [], -1
    edit.load = lambda args: (model, "cpu")  # the fixture puts the real one back
    command = (*command[:3], tmp_path / "long", *command[4:], "--frames", 9, "--overlap", 1)
    code, out, _ = run(capsys, *command)
    assert code == 0 and [len(frames) for frames, _ in model.calls] == [9, 6]


def test_no_input_of_any_row_is_lost_or_taken_for_a_result(negative, rows, tmp_path, capsys):
    """Results beside their sources would be the sources, all there already."""
    before = contents(tmp_path)
    command = (tmp_path / "0.png", tmp_path / "1.png", "x", "-o", tmp_path, "--weights", tmp_path)
    code, out, err = run(capsys, *command)
    assert code == 1 and not out and err.count("is an input, which would be lost") == 2
    row = {"source": "0.png", "instruction": "x", "output": "1.png"}
    file = write_rows(tmp_path / "a.jsonl", row, row | {"source": "1.png", "output": "new.jpg"})
    before = contents(tmp_path) | {"new.jpg": ..., "settings.json": ...}
    code, _, err = run(capsys, "--batch", file, "-o", tmp_path, "--weights", tmp_path)
    before |= {name: contents(tmp_path)[name] for name in ("new.jpg", "settings.json")}
    assert code == 1 and "1.png is an input" in err and contents(tmp_path) == before


def test_a_dialogue_by_rows_on_stdin(tiny_weights, rows, tmp_path):
    """A program writes a row and reads its answer before it writes the next."""
    command = [sys.executable, SCRIPT, "-", "-o", "out", "--weights", tiny_weights]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, cwd=tmp_path, **pipes)
    answers = []
    for line in rows.read_text().splitlines()[:3]:
        process.stdin.write(f"{line}\n\n")
        process.stdin.flush()
        answers.append(json.loads(process.stdout.readline()))
    out, err = process.communicate()
    assert process.returncode == 1 and not out and "2 made" in err and "stdin:3" in err
    assert [answer.get("output") for answer in answers] == ["out/0.png", None, "out/sub/one.jpg"]
    assert "not an edit" in answers[1]["error"] and (tmp_path / "out" / "0.png").is_file()
    row = {"source": "missing.png", "instruction": "x", "output": "again.png"}
    lines = [json.dumps(row | {"source": name}) for name in ("missing.png", "0.png", "1.png")]
    words = "\ufeff" + "\n".join(lines)
    ended = subprocess.run(command, input=words, text=True, cwd=tmp_path, capture_output=True)
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [*map(list, answers)] == [["error"], ["output", "seconds"], ["error"]]
    assert "is the result of stdin:2 already" in answers[2]["error"]
    ended = subprocess.run(
        f"{sys.executable} {SCRIPT} - -o new <&-", shell=True, cwd=tmp_path, capture_output=True
    )
    assert ended.returncode == 0 and not ended.stderr


def test_cuda_needs_no_number(monkeypatch):
    """PyTorch sets a current device by its number only, and people have one GPU and name none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(edit, "check_device", lambda name: None)
    model = SimpleNamespace(config=SimpleNamespace(guidance=5.0), trained=True)
    monkeypatch.setattr("connector.InstructX.from_pretrained", lambda *arguments: model)
    args = edit.parse(["photo.png", "x"])
    assert edit.load(args) == (model, "cuda") and args.dtype == "bfloat16"


class Late:
    """Stands in for a GPU: work is begun at once, and done when somebody waits for it."""

    def __init__(self, monkeypatch):
        self.now, self.pending = 0.0, 0.0
        monkeypatch.setattr(edit.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(edit, "wait_for", self.wait_for)
        monkeypatch.setattr(edit, "peak_memory", self.wait_for)

    def wait_for(self, device):
        self.now, self.pending = self.now + self.pending, 0.0
        return 0


def test_phases_of_a_device_that_works_on(monkeypatch):
    """A GPU has done nothing yet when a step returns; each phase must pay for its own work."""
    gpu, phases = Late(monkeypatch), edit.Phases()
    for phase, seconds in (("encode", [1.0]), ("denoise", [0.7, 0.5, 0.5])):
        phases(phase, 0, len(seconds))
        for done, each in enumerate(seconds, 1):
            gpu.pending += each
            phases(phase, done, len(seconds))
    phases.end()
    assert [phases.rows[name][0] for name in ("encode", "denoise")] == [1.0, pytest.approx(1.7)]
    assert "first step 0.70 s, then 0.50 s each" in phases.rows["denoise"][2]


def test_failing_rows_of_every_kind(negative, rows, tmp_path, monkeypatch, capsys):
    """No memory for one, a fault of the program in another: the third is made."""
    errors, work = [RuntimeError("CUDA out of memory"), KeyError("fault")], Negative.edit

    def interrupt():
        raise KeyboardInterrupt

    def fail(*arguments):
        if errors:
            raise errors.pop(0)
        work(negative, *arguments)

    monkeypatch.setattr(negative, "edit", fail)
    names = [tmp_path / f"{i}.png" for i in range(3)]
    code, out, err = run(capsys, *names, "x", "-o", tmp_path / "out", "--weights", tmp_path)
    assert code == 1 and out == [str(tmp_path / "out" / "2.png")]
    assert "0.png: out of memory; a smaller --area" in err and "1.png: KeyError('fault')" in err
    assert {*contents(tmp_path / "out")} == {"2.png", "settings.json"}
    monkeypatch.setattr(negative, "edit", lambda *arguments: interrupt())
    code, _, err = run(capsys, *names, "x", "-o", tmp_path / "out", "--weights", tmp_path)
    assert code == 130 and "1 kept, 0 failed" in err and err.endswith("interrupted\n")


@pytest.mark.parametrize("script", ["edit.py", "train.py"])
def test_interrupted_while_modules_are_imported(script, tmp_path):
    """Python's traceback through ten files is no answer to Ctrl-C."""
    (tmp_path / "av.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, SCRIPT.with_name(script), "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b"" and process.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError(), "out of memory; a smaller --area"),
        (RuntimeError("CUDA out of memory. Tried to\nallocate 2 GiB"), "out of memory"),
        (FloatingPointError("latents are not finite; try --dtype float32"), "--dtype float32"),
    ],
)
def test_failures_of_the_work(negative, photo, tmp_path, error, said, monkeypatch, capsys):
    """Memory and overflow need a way out. Other errors are bugs, and shown as such."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr(negative, "edit", fail)
    options = (photo, "x", "-o", tmp_path / "out.png", "--weights", tmp_path)
    code, _, err = run(capsys, *options)
    assert code == 2 and err.count("\n") == 1 and said in err
    for words in ("shapes differ", "CUDA error: an illegal memory access was encountered"):
        error = RuntimeError(words)
        with pytest.raises(RuntimeError, match=words):
            run(capsys, *options)
    assert os.listdir(tmp_path) == ["photo.png"]


@pytest.mark.parametrize("name", ["out.mp4", "out.png"])
def test_failing_while_writing_leaves_nothing(negative, clip, tmp_path, name, monkeypatch, capsys):
    """A half-written file under the final name looks like a result."""

    def fail(frames, *arguments):
        arguments[-1](frames[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(negative, "edit", fail)
    code, out, _ = run(capsys, clip, "x", "-o", tmp_path / name, "--weights", tmp_path)
    assert code == 130 and not out and not os.listdir(tmp_path)
    with pytest.raises(OSError):
        write_clip(tmp_path / "no" / "such" / "out.mp4", smooth(32, 48, frames=3), 10)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nobody_reads_what_is_printed(stream, tmp_path):
    """`| head` ends before the work does: that is no reason to lose the result or to complain."""
    Image.fromarray(smooth(40, 56)).save(tmp_path / "photo.png")
    model = "def edit(self, frames, *more): more[-1](frames)"
    script = f"import edit, sys\nclass Model:\n    trained = True\n    {model}\n"
    script += (
        "edit.load = lambda args: (Model(), 'cpu')\nedit.Phases.table = lambda phases: 'table'"
    )
    arguments = [str(tmp_path / "photo.png"), "x", "-o", str(tmp_path / "out.png")]
    script += f"\nedit.note('hello')\nedit.main({arguments})"
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    ended = subprocess.run([sys.executable, "-c", script], cwd=SCRIPT.parent, text=True, **streams)
    os.close(writer)
    assert ended.returncode == 0 and "Error" not in (ended.stderr or "")
    assert (tmp_path / "out.png").is_file()


def test_compiling_without_a_compiler(photo, tmp_path, monkeypatch, capsys):
    """It would be missed by torch at the first step, in pages of text."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    options = ("-o", tmp_path / "out.png", "--compile", "--device", "cpu")
    code, _, err = run(capsys, photo, "x", *options)
    assert code == 2 and err.count("\n") == 1 and "compiler" in err
    assert os.listdir(tmp_path) == ["photo.png"]


# Images


def test_photo_turned_by_exif(negative, tmp_path, capsys):
    """A phone's photo is stored lying: the model would see it so, or a viewer turn it twice."""
    exif, frame = Image.Exif(), smooth(40, 56)
    exif[0x0112], exif[0x010F] = 6, "Maker"  # turn right by 90 degrees; a tag to be kept
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    settings = {"exif": exif, "icc_profile": profile, "quality": 100, "subsampling": 0}
    Image.fromarray(frame).save(tmp_path / "in.jpg", **settings)
    options = ("-o", tmp_path / "out.jpg", "--weights", tmp_path)
    assert run(capsys, tmp_path / "in.jpg", "x", *options)[0] == 0
    result = Image.open(tmp_path / "out.jpg")
    assert result.size == (40, 56) and result.info["icc_profile"] == profile
    assert result.getexif().get(0x0112, 1) == 1 and result.getexif()[0x010F] == "Maker"
    assert difference(result, 255 - np.rot90(frame, -1)) < 2
    assert media_shape(tmp_path / "in.jpg") == (1, 56, 40)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [0, 1, 3, 5, 6, 7, 8, 9])
def test_shape_of_a_turned_photo(tmp_path, suffix, orientation):
    """The shape from the header decides what is edited at all, and must be that of the pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(smooth(40, 56)).save(tmp_path / f"a{suffix}", exif=exif)
    shape = media_shape(tmp_path / f"a{suffix}")
    assert shape == read_frames(tmp_path / f"a{suffix}").frames.shape[:3]


def test_damaged_exif_is_left_out_in_silence(tmp_path):
    """PIL's warnings name lines of PIL, and nobody can do anything about them."""
    broken = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03"
    Image.fromarray(smooth(40, 56)).save(tmp_path / "a.jpg", exif=broken)
    script = f"import edit; edit.read_frames({str(tmp_path / 'a.jpg')!r})"
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr


def test_a_count_that_cannot_be_is_one_line(tmp_path):
    """PIL logs to stderr what it refuses."""
    Image.fromarray(smooth(40, 56)).save(tmp_path / "a.tiff")
    content, samples = (tmp_path / "a.tiff").read_bytes(), b"\x15\x01\x03\0\x01\0\0\0"  # per pixel
    assert samples + b"\x03\0" in content
    content = content.replace(samples + b"\x03\0", samples + b"\x03\x98")
    (tmp_path / "a.tiff").write_bytes(content)
    done = shell(tmp_path / "a.tiff", "x")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_seek_to_nowhere_is_a_number(photo):
    """Damaged clips name places before their start. PyAV would print a traceback of its own."""
    with edit.SeekableFile(photo.open("rb", buffering=0)) as file:
        assert file.seek(3) == 3 and file.seek(-5) == -1 and file.seek(2**70) == -1
        assert file.tell() == 3 and file.seek(-1, os.SEEK_END) == photo.stat().st_size - 1


def test_exif_that_does_not_fit(negative, photo, tmp_path, capsys):
    """90 KB of EXIF, such as a workflow, fail after the work, and an empty block is litter."""
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + '{"node": 1}' * 8000
    Image.open(photo).save(tmp_path / "in.webp", exif=exif)
    options = ("-o", tmp_path / "out.jpg", "--weights", tmp_path)
    code, _, err = run(capsys, tmp_path / "in.webp", "x", *options)
    assert code == 0 and "no room for the EXIF" in err and Image.open(tmp_path / "out.jpg").size
    run(capsys, photo, "x", "-o", tmp_path / "out.png", "--weights", tmp_path)
    assert "exif" not in Image.open(tmp_path / "out.png").info


def test_alpha(negative, tmp_path, capsys):
    """The model must not see what transparent pixels hide, and a cut-out must get no white rim."""
    color, alpha = smooth(32, 48), noise(32, 48)
    alpha[:16] = 0
    Image.fromarray(np.dstack([color, alpha])).save(tmp_path / "in.png")
    options = ("--weights", tmp_path)
    run(capsys, tmp_path / "in.png", "x", "-o", tmp_path / "out.png", *options)
    share = alpha[..., None] / 255
    seen = share * color + (1 - share) * 255
    assert np.abs(negative.frames[0] - seen).max() <= 1
    result = np.asarray(Image.open(tmp_path / "out.png"))
    assert np.array_equal(result[..., 3], alpha)
    on_white = share * result[..., :3] + (1 - share) * 255
    # Elsewhere the negative is darker than any color on white could be.
    possible = (share > 0) & (255 - seen >= (1 - share) * 255)
    assert np.abs(on_white - (255 - seen))[possible].max() <= 1.5
    _, _, err = run(capsys, tmp_path / "in.png", "x", "-o", tmp_path / "out.jpg", *options)
    assert Image.open(tmp_path / "out.jpg").mode == "RGB" and "cannot be transparent" in err
    run(capsys, tmp_path / "in.png", "x", "-o", tmp_path / "out.gif", *options)
    result = np.asarray(Image.open(tmp_path / "out.gif").convert("RGBA"))
    assert np.array_equal(result[..., 3], np.where(alpha < 128, 0, 255))


def test_an_instruction_may_be_the_name_of_a_folder(negative, photo, tmp_path, monkeypatch, capsys):
    """The word night is no mistake where the results of an earlier edit lie in night/."""
    monkeypatch.chdir(tmp_path)
    Path("night").mkdir()
    options = ("-o", "a.png", "--weights", tmp_path)
    assert run(capsys, photo, "night", *options)[0] == 0
    code, _, err = run(capsys, photo, "night/", *options)
    assert code == 2 and "night/ is a file or a folder" in err


def test_a_webp_has_little_room(negative, tmp_path, capsys):
    """It shows only on saving, after hours of work."""
    Image.new("RGB", (9000, 90)).save(tmp_path / "in.png")
    options = ("-o", tmp_path / "out.webp", "--area", 9000, "--weights", tmp_path)
    assert run(capsys, tmp_path / "in.png", "x", *options)[0] == 0
    del negative.frames
    code, _, err = run(capsys, tmp_path / "in.png", "x", *options, "--compare")
    assert code == 2 and "out_compare.webp: a WebP has at most 16383 pixels a side" in err
    assert not hasattr(negative, "frames")


def grey16(path):
    Image.fromarray(np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)).save(path)
    return np.repeat(np.linspace(0, 255, 32 * 48).reshape(32, 48, 1), 3, axis=2)


def converted(mode):
    def write(path):
        image = Image.fromarray(smooth(32, 48)).convert(mode)
        image.save(path)
        return np.asarray(image.convert("RGB"))

    return write


def lab_with_profile(path):
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    image = Image.fromarray(smooth(32, 48))
    image = ImageCms.profileToProfile(image, srgb, lab, 1, "LAB")
    image.save(path, icc_profile=ImageCms.ImageCmsProfile(lab).tobytes())
    return smooth(32, 48)


def palette_with_transparency(path):
    image = Image.fromarray(smooth(32, 48)).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(path, transparency=image.getpixel((0, 0)))
    rgba = np.asarray(Image.open(path).convert("RGBA"))
    return np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])


@pytest.mark.parametrize(
    "suffix, write, error",
    [
        (".png", grey16, 1),
        (".tif", grey16, 1),
        (".png", converted("L"), 0),
        (".png", converted("1"), 0),
        (".gif", converted("P"), 0),
        (".png", palette_with_transparency, 0),
        (".tif", converted("CMYK"), 0),
        (".tif", lab_with_profile, 2),
        (".bmp", converted("RGB"), 0),
        (".webp", converted("RGB"), 4),
    ],
)
def test_pixel_formats(tmp_path, suffix, write, error):
    """PIL's convert("RGB") makes 16-bit grey white, and shows what is below transparent pixels."""
    expected = write(tmp_path / f"in{suffix}")
    media = read_frames(tmp_path / f"in{suffix}")
    assert not media.is_video and media.frames.shape == (1, 32, 48, 3)
    assert media.frames.dtype == np.uint8 and difference(media.frames[0], expected) <= error


def test_profile_and_text_of_a_tiff(negative, tmp_path, capsys):
    """Without its profile the colors of a TIFF change; with its tags the result is no file."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    settings = {"icc_profile": profile, "software": "Scanner", "compression": "tiff_lzw"}
    Image.fromarray(smooth(32, 48)).save(tmp_path / "in.tif", **settings)
    options = ("-o", tmp_path / "out.jpg", "--weights", tmp_path)
    assert run(capsys, tmp_path / "in.tif", "x", *options)[0] == 0
    result = Image.open(tmp_path / "out.jpg")
    assert result.info["icc_profile"] == profile and dict(result.getexif()) == {0x131: "Scanner"}


def test_every_image_format(tmp_path):
    """An extension that is offered must be written."""
    for suffix in IMAGE_OPTIONS:
        with image_writer(tmp_path / f"a{suffix}") as write:
            write(smooth(33, 47))
        assert difference(read_frames(tmp_path / f"a{suffix}").frames[0], smooth(33, 47)) < 8


def test_content_tells_not_the_name(negative, clip, photo, tmp_path, capsys):
    """Downloads are often misnamed: a clip called .jpg is a clip."""
    shutil.copy(clip, tmp_path / "clip.jpg")
    shutil.copy(photo, tmp_path / "photo.mp4")
    options = ("--weights", tmp_path)
    assert run(capsys, tmp_path / "clip.jpg", "x", "-o", tmp_path / "a.mp4", *options)[0] == 0
    assert run(capsys, tmp_path / "photo.mp4", "x", "-o", tmp_path / "a.png", *options)[0] == 0


def test_size_and_compare(negative, photo, clip, tmp_path, capsys):
    """--compare must show what was edited, and leave the output what it is without."""
    options = ("--size", "32x24", "--compare", "--weights", tmp_path)
    code, out, _ = run(capsys, photo, "x", "-o", tmp_path / "a.png", *options)
    left, right = np.split(np.asarray(Image.open(tmp_path / "a_compare.png")), 2, axis=1)
    assert code == 0 and out == [str(tmp_path / "a.png"), str(tmp_path / "a_compare.png")]
    assert left.shape == (24, 32, 3) and np.array_equal(left, 255 - right)
    assert np.array_equal(right, np.asarray(Image.open(tmp_path / "a.png")))
    run(capsys, clip, "x", "-o", tmp_path / "a.mp4", *options)
    assert read_frames(tmp_path / "a_compare.mp4").frames.shape == (10, 24, 64, 3)


def test_progress_is_a_strip_of_what_the_model_expects(tiny_weights, clip, photo, tmp_path, capsys):
    """The last picture is the result itself; a file that cannot be is told before the work."""
    usual = ("--weights", tiny_weights, "--steps", 9, "--progress", tmp_path / "steps.png")
    code, out, _ = run(capsys, photo, "x", "-o", tmp_path / "o.png", *usual)
    assert code == 0 and out == [str(tmp_path / "o.png"), str(tmp_path / "steps.png")]
    strip = np.asarray(Image.open(tmp_path / "steps.png")).reshape(40, 6, 56, 3).swapaxes(0, 1)
    assert len({picture.tobytes() for picture in strip}) == 6
    away = [difference(picture, Image.open(tmp_path / "o.png")) for picture in strip]
    assert max(away) == away[0] and min(away) == away[-1] < 1
    options = ("--frames", 9, "--overlap", 5)
    code, _, _ = run(capsys, clip, "x", "-o", tmp_path / "o.mp4", *usual, *options)
    assert code == 0 and Image.open(tmp_path / "steps.png").size == (6 * 64, 48)
    for more, said in (
        (["--progress", photo], "is an input"),
        (["--progress", tmp_path / "a.mp4"], "one .png or .jpg, for one edit"),
        (["--progress", tmp_path / "a.webp"], "one .png or .jpg, for one edit"),  # too wide for it
        (["--progress", tmp_path / "o.png"], "o.png is the result"),
        (["--progress", tmp_path / "no" / "a.png"], "cannot be written"),
        (["-o", f"{tmp_path}/"], "for one edit"),
    ):
        arguments = (photo, "x", "-o", tmp_path / "o.png", *usual, *more)
        code, _, err = run(capsys, *arguments)
        assert code == 2 and err.count("\n") == 1 and said in err


def test_folder_of_frames(tmp_path):
    """In the order of letters frame 10 comes before frame 2; a Mac's ._0.png is no picture."""
    frames = noise(12, 16, 24, 3)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame_{i}.png")
    (tmp_path / "._frame_0.png").write_bytes(b"\0\5\x16\7" + bytes(100))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    media = read_frames(tmp_path, limit=11)
    assert np.array_equal(media.frames, frames[:11]) and (media.total, media.is_video) == (12, True)
    assert read_frames(tmp_path, size=(12, 8)).frames.shape == (12, 8, 12, 3)
    assert media_shape(tmp_path) == (12, 16, 24)


def test_not_a_folder_of_frames(tmp_path):
    """Frames of different sizes, scaled to one, would be a clip of things that jump."""
    with pytest.raises(MediaError, match="folder"):
        read_frames(tmp_path)
    png(16, 16)(tmp_path / "a.png")
    png(16, 24)(tmp_path / "b.png")
    for size in (None, (16, 16)):
        with pytest.raises(MediaError, match="one size"):
            read_frames(tmp_path, size=size)


# Clips: frames and times


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("rate", ["24000/1001", "30000/1001", "25", "12", "50/3", "120000/1001"])
def test_exact_frame_rate(tmp_path, suffix, rate):
    """29.97 for 30000/1001 drifts from the sound; Matroska stores rounded milliseconds."""
    write_clip(tmp_path / f"a{suffix}", smooth(32, 48, frames=7), Fraction(rate))
    media = read_frames(tmp_path / f"a{suffix}", limit=5)
    assert (media.fps, media.times, media.total) == (Fraction(rate), (), 7)
    assert len(media.frames) == 5 and media_shape(tmp_path / f"a{suffix}") == (7, 32, 48)


@pytest.mark.parametrize("suffix", CLIP_OPTIONS)
@pytest.mark.parametrize("shape", [(5, 32, 48), (5, 33, 47), (1, 32, 48)])
def test_every_format_keeps_size_and_number_of_frames(tmp_path, suffix, shape):
    """H.264 with halved colors refuses odd sides, and other writers round sides up to 16."""
    frames = smooth(*shape[1:], frames=shape[0])
    write_clip(tmp_path / f"a{suffix}", frames, 10)
    media = read_frames(tmp_path / f"a{suffix}")
    assert media.frames.shape == frames.shape
    assert shape[0] == 1 or media.fps == 10
    limit = {".png": 0, ".gif": 12, ".webp": 8}.get(suffix, 4)  # APNG is lossless
    assert difference(media.frames, frames) <= limit


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
def test_the_last_frame_is_shown_as_long_as_before(tmp_path, suffix):
    """With B-frames the end of an H.264 clip has the duration of some other frame."""
    frames, times = (
        smooth(48, 64, frames=5),
        tuple(Fraction(n, 100) for n in (0, 1, 21, 24, 28, 38)),
    )
    media = Media(tmp_path, frames, Fraction(13), times=times)
    write_clip(tmp_path / f"a{suffix}", frames, 13, media)
    result = read_frames(tmp_path / f"a{suffix}").times
    assert [round(float(time), 2) for time in result] == [float(time) for time in times]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm", ".gif", ".webp", ".png"])
def test_varying_frame_rate(tmp_path, suffix):
    """Frames are neither doubled nor dropped, and each stays at its time."""
    uneven = "select='not(mod(n,3))+gt(n,15)'"
    film(tmp_path / "vfr.mp4", "-vf", uneven, "-fps_mode", "vfr", *H264, rate=30)
    source = read_frames(tmp_path / "vfr.mp4")
    write_clip(tmp_path / f"out{suffix}", source.frames, source.fps, source)
    result = read_frames(tmp_path / f"out{suffix}")
    assert source.times and result.times and len(source.frames) == 20
    assert result.frames.shape == source.frames.shape
    moved = [abs(a - b) for a, b in zip(source.times, result.times)]
    assert max(moved[:-1]) <= Fraction(1, 100 if suffix == ".gif" else 500) and moved[-1] < 0.02


def test_hours_between_frames_are_damage(negative, tmp_path, capsys):
    """A time stamp with a flipped bit: MP4 has no room for 26 hours, and failed after the work."""
    frames = smooth(32, 48, frames=5)
    times = tuple(Fraction(n, 25) + (n > 2) * 95_000 for n in range(6))
    write_clip(tmp_path / "a.mkv", frames, 25, Media(tmp_path, frames, Fraction(25), times=times))
    options = ("-o", tmp_path / "b.mp4", "--weights", tmp_path)
    code, _, err = run(capsys, tmp_path / "a.mkv", "x", *options)
    result = read_frames(tmp_path / "b.mp4") if not code else err
    assert code == 0 and len(result.frames) == 5 and not result.times, err


def test_trimmed_by_an_edit_list(tmp_path):
    """A phone trims without coding anew: the file has more frames than it shows."""
    film(tmp_path / "all.mp4", *H264, "-g", 250, seconds=3)
    ffmpeg("-ss", 0.72, "-i", tmp_path / "all.mp4", "-c", "copy", tmp_path / "trim.mp4")
    media = read_frames(tmp_path / "trim.mp4")
    assert len(media.frames) == media.total == 57 and media.start == 0
    assert media_shape(tmp_path / "trim.mp4") == media.frames.shape[:3]


def test_longer_clips_are_cut_aloud(negative, clip, tmp_path, capsys):
    """750 frames read without a word is a complaint; a cut clip with its whole sound is another."""
    options = ("-o", tmp_path / "out.mp4", "--frames", 4, "--weights", tmp_path)
    code, _, err = run(capsys, clip, "x", *options)
    assert code == 0 and re.search(r"has 10 frames; the first 4 are", err)
    assert len(read_frames(tmp_path / "out.mp4").frames) == 4
    (_, _, sound), (_, _, whole) = sounds(tmp_path / "out.mp4")[0], sounds(clip)[0]
    assert sound == whole[: len(sound)]
    assert 4 / 29.97 <= len(sound) * 1024 / 44100 < 4 / 29.97 + 3 * 1024 / 44100


class Windows(Negative):
    """The negative, of which every window is a level darker than the one before."""

    def edit(self, frames, *arguments, start=None):
        self.calls.append((frames, start))
        self.level += 1
        super().edit(frames + np.uint8(self.level), *arguments)


@pytest.mark.parametrize("suffix", [".mkv", ".webp"])
@pytest.mark.parametrize(
    "length, overlap, expected",  # (first frame, frames, shared) of each window
    [
        (25, 1, [(0, 9, 0), (8, 9, 1), (16, 9, 1)]),
        (25, 5, [(0, 9, 0), (4, 9, 5), (8, 9, 5), (12, 9, 5), (16, 9, 5)]),
        (20, 1, [(0, 9, 0), (8, 9, 1), (12, 8, 5)]),
        (18, 1, [(0, 9, 0), (8, 9, 1), (12, 6, 5)]),
        (9, 5, [(0, 9, 0)]),
        (4, 1, [(0, 4, 0)]),
    ],
)
def test_windows_of_a_long_clip(tmp_path, monkeypatch, suffix, length, overlap, expected, capsys):
    """A frame left out or twice, or a window that does not go on from the one before."""
    frames = smooth(48, 64, length) // 2
    monkeypatch.setitem(CLIP_OPTIONS, ".webp", ("webp", "libwebp_anim", "bgra", {"lossless": "1"}))
    lossless = ("matroska", "libx264rgb", "rgb24", {"qp": "0"})
    monkeypatch.setitem(CLIP_OPTIONS, ".mkv", lossless)
    write_clip(tmp_path / f"in{suffix}", frames, 10)
    model = Windows()
    model.calls, model.level = [], -1
    monkeypatch.setattr(edit, "load", lambda args: (model, "cpu"))
    options = ("--frames", 9, "--overlap", overlap, "-o", tmp_path / f"out{suffix}")
    code, _, err = run(capsys, tmp_path / f"in{suffix}", "x", *options, "--weights", tmp_path)
    assert code == 0 and err.count("frames are done") == len(expected) - 1
    result = read_frames(tmp_path / f"out{suffix}").frames
    assert len(result) == length and len(model.calls) == len(expected)
    for number, ((first, count, shared), (shown, start)) in enumerate(zip(expected, model.calls)):
        assert np.array_equal(shown, frames[first : first + count])
        new = slice(first + shared, first + count)
        assert np.array_equal(result[new], 255 - number - frames[new])
        if shared:  # what the window before made of them
            assert np.array_equal(start, 256 - number - frames[first : first + shared])
        else:
            assert start is None


def test_windows_of_a_clip_that_is_cut_meanwhile():
    """Frames that never come must not be waited for."""
    with pytest.raises(ValueError, match="a.mp4 became shorter"):
        list(edit.windows(iter(range(12)), 20, 9, 1, "a.mp4"))


def test_windows_of_other_sizes_and_kinds(negative, photo, clip, tmp_path, capsys):
    """Scaled clips, images and short clips; lengths that the VAE could not share."""
    options = ("--overlap", 5, "--weights", tmp_path)
    for frames, overlap in ((9, 9), (9, 4), (10, 5)):
        wrong = ("--frames", frames, "--overlap", overlap)
        code, _, err = run(capsys, clip, "x", "-o", tmp_path / "o.mp4", *options, *wrong)
        assert code == 2 and err.count("\n") == 1 and "1 + a multiple of 4" in err
    code, _, _ = run(capsys, photo, "x", "-o", tmp_path / "o.png", *options)
    assert code == 0 and negative.frames.shape == (1, 40, 56, 3)
    model = Windows()
    model.calls, model.level = [], -1
    edit.load = lambda args: (model, "cpu")  # the fixture puts the real one back
    more = ("--frames", 9, "--area", 1000, "--compare")
    code, _, err = run(capsys, clip, "x", "-o", tmp_path / "o.mp4", *options, *more)
    assert code == 0 and [len(frames) for frames, _ in model.calls] == [9, 6]
    assert model.calls[1][1].shape == (5, 24, 32, 3)
    assert read_frames(tmp_path / "o.mp4").frames.shape == (10, 48, 64, 3)
    assert read_frames(tmp_path / "o_compare.mp4").frames.shape == (10, 48, 128, 3)


@pytest.mark.slow
def test_memory_of_many_edits_and_of_long_clips(tmp_path):
    """A night of edits, or an hour of film, must not end for want of memory."""
    script = """
import json, sys, edit
class Negative:
    trained = True
    def edit(self, frames, *arguments, start=None):
        arguments[-1](255 - frames)
peaks, read = [], edit.Tally.make
def make(self, *arguments):
    peaks.append(edit.peak_memory("cpu"))
    read(self, *arguments)
edit.Tally.make = make
edit.load = lambda args: (Negative(), "cpu")
try:
    edit.main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code == 0, ended.code
print(json.dumps(peaks))
"""

    def peaks(*arguments):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        ended = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True)
        return json.loads(ended.stdout.splitlines()[-1])

    Image.fromarray(smooth(400, 600)).save(tmp_path / "a.png")
    many = [{"source": "a.png", "instruction": "x", "output": f"{i}.png"} for i in range(200)]
    rows = write_rows(tmp_path / "rows.jsonl", *many)
    during = peaks("--batch", rows, "-o", tmp_path / "many")
    assert len(during) == 200 and during[-1] - during[19] < 10e6
    options = ("--overlap", 5, "--frames", 9, "--area", 360 * 640)
    highest = []
    for seconds in (4, 16):
        clip = film(tmp_path / f"{seconds}.mp4", size="640x360", seconds=seconds)
        highest += peaks(clip, "x", "-o", f"{tmp_path}/{seconds}/", *options)
    assert highest[1] - highest[0] < 50e6  # 300 more frames of 0.7 MB


def test_frames_that_cannot_be_decoded(negative, tmp_path, capsys):
    """Fewer frames than the file lists: --frames has nothing to do with it."""
    film(tmp_path / "in.flv", "-c:v", "flv", "-f", "flv")
    data = bytearray((tmp_path / "in.flv").read_bytes())
    cut = len(data) * 2 // 3
    (tmp_path / "in.flv").write_bytes(data[:cut])
    options = ("-o", tmp_path / "out.mp4", "--weights", tmp_path)
    code, _, err = run(capsys, tmp_path / "in.flv", "x", *options)
    media = read_frames(tmp_path / "in.flv")
    assert code == 0 and len(read_frames(tmp_path / "out.mp4").frames) == len(media.frames)
    assert "--frames" not in err


def test_one_frame_clip(negative, clip, tmp_path, capsys):
    """It is edited as an image, but stays a clip."""
    ffmpeg("-i", clip, "-frames:v", 1, "-an", tmp_path / "one.mp4")
    options = ("-o", tmp_path / "out.mp4", "--weights", tmp_path)
    assert run(capsys, tmp_path / "one.mp4", "x", *options)[0] == 0
    media = read_frames(tmp_path / "out.mp4")
    assert media.is_video and media.frames.shape == (1, 48, 64, 3)
    assert media.fps == Fraction(30000, 1001)


def test_gif_of_60_frames_per_second(tmp_path):
    """Browsers show frames of 10 ms for 100 ms, so that half a second plays for two."""
    film(tmp_path / "in.mp4", rate=60, seconds=0.5)
    media, said = read_frames(tmp_path / "in.mp4"), []
    path, shape = tmp_path / "out.gif", media.frames.shape
    with edit.clip_writer(path, shape, media.fps, media, said.append) as write:
        for frame in media.frames:
            write(frame)
    result = read_frames(path)
    assert len(result.frames) / result.fps == Fraction(1, 2) and result.fps <= 50
    assert "50 frames per second" in said[0]


def test_a_million_claimed_frames(tmp_path):
    """13 KB of MOV that list 10^6 frames took half a minute and 0.75 GB."""
    settings = ("-frames:v", 1, "-c:v", "rawvideo", "-pix_fmt", "rgb24")
    film(tmp_path / "one.mov", *settings)
    data = (tmp_path / "one.mov").read_bytes()
    start, count, chunk = data.index(b"moov") - 4, 10**6, 20_000
    offset = struct.pack(">I", data.index(b"mdat") + 4)
    tables = {
        b"stsz": struct.pack(">III", 0, 1, count),
        b"stts": struct.pack(">IIII", 0, 1, count, 1),
        b"stsc": struct.pack(">IIIII", 0, 1, 1, chunk, 1),
        b"stco": struct.pack(">II", 0, count // chunk) + offset * (count // chunk),
    }

    def rewrite(boxes):
        written = b""
        while boxes:
            size, name = struct.unpack(">I4s", boxes[:8])
            body, boxes = boxes[8:size], boxes[size:]
            if name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
                body = rewrite(body)
            body = tables.get(name, body)
            written += struct.pack(">I4s", len(body) + 8, name) + body
        return written

    (tmp_path / "many.mov").write_bytes(data[:start] + rewrite(data[start:]))
    before, now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(MediaError):
        read_frames(tmp_path / "many.mov", 81)
    assert time.perf_counter() - now < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


# Clips: sound and other tracks


def test_sound_that_the_format_cannot_hold(negative, clip, tmp_path, capsys):
    """AAC cannot be in WebM: it is coded anew. A GIF has none, which must be said."""
    run(capsys, clip, "x", "-o", tmp_path / "out.webm", "--weights", tmp_path)
    assert [track[0] for track in sounds(tmp_path / "out.webm")] == ["opus"]
    code, _, err = run(capsys, clip, "x", "-o", tmp_path / "out.gif", "--weights", tmp_path)
    assert code == 0 and "no sound" in err


@pytest.mark.parametrize("layout", ["5.1(side)", "quad", "2.1", "7.1"])
@pytest.mark.parametrize("codec", ["ac3", "pcm_s16le"])
def test_surround_to_webm(tmp_path, layout, codec):
    """Opus refuses these layouts, and the work was lost to them."""
    if (layout, codec) == ("7.1", "ac3"):
        pytest.skip("AC-3 has no 7.1")
    channels = {"quad": 4, "2.1": 3, "7.1": 8}.get(layout, 6)
    pan = f"pan={layout}|" + "|".join(f"c{i}=c0" for i in range(channels))
    picture, sound = ("-f", "lavfi", "-i", "testsrc=s=64x48:r=10"), ("-f", "lavfi", "-i", "sine")
    options = ("-t", "0.5", "-af", pan, *H264, "-c:a", codec)
    ffmpeg(*picture, *sound, *options, tmp_path / "in.mkv")
    media = read_frames(tmp_path / "in.mkv")
    for suffix in (".webm", ".mp4", ".mov", ".mkv"):
        write_clip(tmp_path / f"out{suffix}", media.frames, media.fps, media)
        with av.open(str(tmp_path / f"out{suffix}")) as container:
            assert sum(frame.samples for frame in container.decode(audio=0)) > 20_000


def test_sound_that_ends_without_a_time(tmp_path):
    """What WMA's decoder gives at the end has none: the whole track was left out."""
    film(tmp_path / "a.asf", *H264, "-c:a", "wmav2", sound=True)
    media = read_frames(tmp_path / "a.asf")
    for suffix in (".mp4", ".webm"):
        write_clip(tmp_path / f"out{suffix}", media.frames, media.fps, media)
        (_, times, _) = sounds(tmp_path / f"out{suffix}")[0]
        assert times[0] < 0.2 and times[-1] > 0.9


def test_a_track_that_nobody_can_decode(negative, tmp_path, capsys):
    """An iPhone records "spatial audio" beside AAC: only that is left out, and aloud."""
    tones = [("-f", "lavfi", "-i", f"sine={tone}") for tone in (440, 880)]
    picture = ("-f", "lavfi", "-i", "testsrc=s=64x48:r=10")
    maps = ("-map", 0, "-map", 1, "-map", 2, "-t", "0.5", *H264, "-c:a", "aac")
    ffmpeg(*picture, *tones[0], *tones[1], *maps, tmp_path / "two.mp4")
    data = bytearray((tmp_path / "two.mp4").read_bytes())
    last = data.rindex(b"stsd")
    for old, new in ((b"mp4a", b"zzzz"), (b"esds", b"zzzy")):
        at = data.index(old, last)
        data[at : at + 4] = new
    (tmp_path / "phone.mp4").write_bytes(data)
    for suffix in (".mp4", ".mov", ".mkv", ".webm"):
        options = ("-o", tmp_path / f"out{suffix}", "--weights", tmp_path)
        code, _, err = run(capsys, tmp_path / "phone.mp4", "x", *options)
        assert code == 0 and len(sounds(tmp_path / f"out{suffix}")) == 1
        assert "left out of the result: audio track 2" in err


@pytest.mark.parametrize("suffix", ["mp4", "ts", "mpg", "mkv"])
def test_sound_keeps_its_offset(tmp_path, suffix):
    """In transport streams time does not start at 0: sound was moved by half a second."""
    coding = ("-c", "copy")
    if suffix == "mpg":
        coding = ("-c:v", "mpeg2video", "-r", 25, "-c:a", "mp2")
    film(tmp_path / "clip.mp4", *H264, sound=True)
    both = ("-itsoffset", 0.4, "-i", tmp_path / "clip.mp4", "-i", tmp_path / "clip.mp4")
    for maps in (("-map", "1:v", "-map", "0:a"), ("-map", "0:v", "-map", "1:a")):
        ffmpeg(*both, *maps, *coding, tmp_path / f"in.{suffix}")
        media = read_frames(tmp_path / f"in.{suffix}")
        write_clip(tmp_path / "out.mp4", media.frames, media.fps, media)
        before, after = (sounds(tmp_path / name)[0][1] for name in (f"in.{suffix}", "out.mp4"))
        assert after[-1] == pytest.approx(before[-1] - float(media.start), abs=0.003)
        assert read_frames(tmp_path / "out.mp4").start == 0 and len(after) > 20


def test_titles_languages_and_subtitles(tmp_path):
    """Without its language a track is not chosen; what cannot go along must be said."""
    (tmp_path / "s.srt").write_text("1\n00:00:00,100 --> 00:00:00,900\nHello\n")
    chapter = "[CHAPTER]\nTIMEBASE=1/1000\nSTART={}\nEND={}\ntitle=part\n"
    about = ";FFMETADATA1\ntitle=Ferien\n" + chapter.format(0, 500) + chapter.format(500, 1000)
    (tmp_path / "about.txt").write_text(about)
    film(tmp_path / "a.mp4", *H264, sound=True)
    inputs = ("-i", tmp_path / "a.mp4", "-i", tmp_path / "s.srt", "-i", tmp_path / "about.txt")
    labels = ("-map_metadata", 2, "-metadata:s:a", "language=deu", "-metadata:s:s", "language=eng")
    ffmpeg(*inputs, "-map", 0, "-map", 1, *labels, "-c", "copy", tmp_path / "in.mkv")
    media = read_frames(tmp_path / "in.mkv")
    for suffix, subtitles in ((".mkv", ["eng"]), (".mp4", []), (".webm", [])):
        said, shape = [], media.frames.shape
        path = tmp_path / f"out{suffix}"
        with edit.clip_writer(path, shape, media.fps, media, said.append) as write:
            for frame in media.frames:
                write(frame)
        with av.open(str(path)) as container:
            assert container.metadata["title"] == "Ferien" and not container.chapters()
            assert container.streams.audio[0].language == "deu"
            assert [track.language for track in container.streams.subtitles] == subtitles
        assert "left out of the result: chapters" in said[0]
        assert ("subtitle track 2" in said[0]) == (not subtitles)


@pytest.mark.parametrize(
    "name, title",
    [
        ("Audio: take 1.mp4", "x"),
        ("my partial file.mp4", "Audio: my song"),
        ("stream ended prematurely.mp4", "[SAR 3:1 DAR 3:1], 99 fps"),
        ("concat:a|b.mp4", "partial file"),
        ("-5 %d ü\n.mp4", "Video: h264, yuv420p(tv, bt709)"),
    ],
)
def test_names_and_titles_are_only_words(negative, tmp_path, name, title, capsys):
    """Whoever reads a program's messages takes the words of a file for the program's own."""
    film(tmp_path / "a.mp4", *H264, "-metadata", f"title={title}", "-metadata", f"comment={title}")
    (tmp_path / "a.mp4").rename(tmp_path / name)
    options = ("-o", tmp_path / f"out {name}", "--weights", tmp_path)
    code, _, err = run(capsys, tmp_path / name, "x", *options)
    media = read_frames(tmp_path / f"out {name}")
    assert code == 0 and len(media.frames) == 25
    source = read_frames(tmp_path / name)
    assert not source.sound and not source.aspect and not source.colors


def test_clips_open_no_other_file(tmp_path):
    """Playlists and reference movies of strangers could show any file of this machine."""
    film(tmp_path / "secret.mp4")
    texts = {
        "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        "a.mp4": "ffconcat version 1.0\nfile secret.mp4\n",
        "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    }
    for name, words in texts.items():
        (tmp_path / name).write_text(words)
        with pytest.raises(MediaError, match="neither"):
            read_frames(tmp_path / name)


# Clips: pixels and colors


def test_clip_turned_by_its_metadata(negative, clip, tmp_path, capsys):
    """A phone's clip is stored lying, or mirrored by its front camera."""
    upright = read_frames(clip).frames
    turns = {
        ("-display_rotation", 90): np.rot90(upright, 1, axes=(1, 2)),
        ("-display_rotation", 180): np.rot90(upright, 2, axes=(1, 2)),
        ("-display_hflip",): upright[:, :, ::-1],
    }
    for options, expected in turns.items():
        ffmpeg(*options, "-i", clip, "-c", "copy", tmp_path / "turned.mp4")
        output = ("-o", tmp_path / "out.mp4", "--weights", tmp_path)
        run(capsys, tmp_path / "turned.mp4", "x", *output)
        result = read_frames(tmp_path / "out.mp4").frames
        assert result.shape == expected.shape and difference(result, 255 - expected) < 12
        assert media_shape(tmp_path / "turned.mp4") == expected.shape[:3]


def test_pixels_that_are_not_square(clip, tmp_path):
    """Clips from tape and disc are stored narrower than they are shown."""
    ffmpeg("-i", clip, "-vf", "setsar=5/4", tmp_path / "wide.mp4")
    media = read_frames(tmp_path / "wide.mp4")
    for suffix in (".mp4", ".mkv", ".mov"):
        write_clip(tmp_path / f"out{suffix}", media.frames, media.fps, media)
        assert read_frames(tmp_path / f"out{suffix}").aspect == Fraction(5, 4)
    assert read_frames(clip).aspect is None
    assert read_frames(tmp_path / "wide.mp4", size=(32, 24)).aspect is None


@pytest.mark.parametrize(
    "colors", [(1, 1, 1), (6, 6, 6), (5, 5, 6), (9, 9, 18), (9, 9, 16), (1, 1, 13), (9, 9, 14)]
)
def test_colors_go_back_as_they_came(tmp_path, colors):
    """HD, HDR and screen recordings code colors by other formulas; reds and greens would shift."""
    frames = smooth(48, 64, frames=3)
    for suffix in (".mp4", ".mkv"):
        path = tmp_path / f"a{suffix}"
        write_clip(path, frames, 10, Media(tmp_path, frames, colors=colors))
        media = read_frames(path)
        assert media.colors == colors and difference(media.frames, frames) < 4


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_clips_do_not_get_darker(tmp_path, suffix):
    """FFmpeg's quick conversion takes a level off each time: an edit would be seen to fade."""
    column = np.linspace(20, 235, 64).round().astype(np.uint8)[:, None]
    ramp = np.broadcast_to(column, (2, 48, 64, 3))
    write_clip(tmp_path / f"a{suffix}", ramp, 10)
    assert abs((read_frames(tmp_path / f"a{suffix}").frames.astype(int) - ramp).mean()) < 0.3


def test_colors_of_clips_do_not_move(tmp_path):
    """Read at one place of a pixel pair and written at another, colors creep sideways each time."""
    blocks = np.kron(noise(2, 6, 8, 3), np.ones((1, 8, 8, 1), np.uint8))
    write_clip(tmp_path / "a.mp4", blocks, 10)
    frames = read_frames(tmp_path / "a.mp4").frames
    left, right = (difference(frames, np.roll(blocks, shift, axis=2)) for shift in (-1, 1))
    assert left == pytest.approx(right, rel=0.05)


def test_large_rgb_is_tagged_bt709(tmp_path):
    """Players take HD without a tag for BT.709: green from a GIF or a screen would change."""
    green = np.zeros((2, 720, 1280, 3), np.uint8)
    green[..., 1] = 255
    write_clip(tmp_path / "a.mp4", green, 10)
    assert read_frames(tmp_path / "a.mp4").colors == (1, 1, 1)
    unknown = "colour_primaries=2:transfer_characteristics=2:matrix_coefficients=2"
    untag = ("-c", "copy", "-bsf:v", f"h264_metadata={unknown}")
    ffmpeg("-i", tmp_path / "a.mp4", *untag, tmp_path / "untagged.ts")
    media = read_frames(tmp_path / "untagged.ts")
    assert not media.colors and difference(media.frames, green) < 2


def test_bits_and_fields_are_said(negative, tmp_path, capsys):
    """10 bits become 8, and woven fields whole frames: neither without a word."""
    film(tmp_path / "ten.mov", "-c:v", "prores_ks", "-pix_fmt", "yuv422p10le", seconds=0.2)
    woven = "tinterlace=interleave_top,format=yuv420p,setfield=tff"
    x264 = ("-c:v", "libx264", "-flags", "+ildct+ilme", "-x264opts", "tff=1")
    film(tmp_path / "int.mp4", "-vf", woven, *x264, rate=50, size="160x96")
    for name, said in (("ten.mov", "10 bits"), ("int.mp4", "interlaced")):
        for frames in (81, 4):
            options = ("-o", tmp_path / "out.mp4", "--weights", tmp_path, "--frames", frames)
            code, _, err = run(capsys, tmp_path / name, "x", *options)
            assert code == 0 and said in err
    media = read_frames(tmp_path / "int.mp4")
    assert media.frames.shape == (25, 96, 160, 3) and media.fps == 25 and not media.times


def test_alpha_of_clips(tmp_path):
    """What transparent pixels hide is not for the model, and the result must stay transparent."""
    rgba = "format=rgba,geq=r=220-9*N:g=30:b=30:a='if(lt(hypot(X-24,Y-24),20),255,0)'"
    codecs = {
        "a.mov": ("-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"),
        "a.webm": ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-b:v", "1M"),
    }
    for name, codec in codecs.items():
        film(tmp_path / name, "-vf", rgba, *codec, seconds=0.2)
        media = read_frames(tmp_path / name)
        assert media.frames[:, :, 50:].min() > 250 and media.alpha[:, 20:28, 20:28].min() > 250
        assert difference(media.frames[0, 24, 24], (220, 30, 30)) < 8
        for suffix in (".mov", ".webm", ".png", ".gif", ".webp"):
            write_clip(tmp_path / f"out{suffix}", media.frames, media.fps, media)
            result = read_frames(tmp_path / f"out{suffix}")
            assert result.alpha[:, :, 50:].max() < 5 and result.alpha[:, 20:28, 20:28].min() > 250
            assert difference(result.frames[0, 24, 24], media.frames[0, 24, 24]) < 8
    said = []
    with edit.clip_writer(tmp_path / "o.mp4", media.frames.shape, 25, media, said.append):
        assert "transparent" in said[0]


def test_half_transparent_pixels_in_a_gif(tmp_path):
    """A GIF shows a pixel or not: as opaque ones they keep the color that they have on white."""
    frames = np.full((3, 32, 48, 3), (255, 127, 127), np.uint8)  # red, half transparent
    alpha = np.full(frames.shape[:3], 128, np.uint8)
    alpha[:, :8] = 0
    write_clip(tmp_path / "a.gif", frames, 10, Media(tmp_path, frames, alpha=alpha))
    result = read_frames(tmp_path / "a.gif")
    assert not result.alpha[:, :8].any() and result.alpha[:, 8:].min() == 255
    assert difference(result.frames[:, 8:], frames[:, 8:]) < 4


def test_colors_that_are_not_converted_are_said(negative, tmp_path, capsys):
    """YCgCo, which FFmpeg's scaler does not know, would be taken for another matrix in silence."""
    tags = "h264_metadata=colour_primaries=1:transfer_characteristics=1:matrix_coefficients=8"
    film(tmp_path / "a.mp4", *H264, "-bsf:v", tags, seconds=0.2)
    options = ("-o", tmp_path / "out.mp4", "--weights", tmp_path)
    code, _, err = run(capsys, tmp_path / "a.mp4", "x", *options)
    assert code == 0 and "matrix 8" in err


def test_animations_are_clips(negative, tmp_path, capsys):
    """PIL opens a GIF as an image: its other frames would be dropped without a word."""
    frames = [Image.fromarray(frame) for frame in smooth(32, 48, frames=4)]
    for suffix in (".gif", ".webp", ".png"):
        path = tmp_path / f"a{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=80)
        options = ("-o", tmp_path / "out.mp4", "--frames", 3, "--weights", tmp_path)
        code, _, err = run(capsys, path, "x", *options)
        media = read_frames(tmp_path / "out.mp4")
        assert code == 0 and "has 4 frames; the first 3" in err and media.fps == Fraction(25, 2)
        assert negative.frames.shape == (3, 32, 48, 3) and media_shape(path) == (4, 32, 48)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_alpha_durations_and_loops_of_animations(negative, tmp_path, suffix, capsys):
    """A sticker that lies on white, plays at another speed or for ever is another sticker."""
    frames = []
    for i in range(4):
        rgba = np.zeros((48, 64, 4), np.uint8)
        rgba[10:30, 5 + 4 * i : 30 + 4 * i] = (220, 30, 30, 255)
        frames.append(Image.fromarray(rgba))
    durations, more = [100, 50, 200, 900], {"disposal": 2} if suffix == ".gif" else {}
    settings = {"save_all": True, "append_images": frames[1:], "duration": durations, **more}
    frames[0].save(tmp_path / f"a{suffix}", loop=3, lossless=True, **settings)
    options = ("-o", tmp_path / f"b{suffix}", "--weights", tmp_path)
    assert run(capsys, tmp_path / f"a{suffix}", "x", *options)[0] == 0
    before, after = (read_frames(tmp_path / f"{name}{suffix}") for name in "ab")
    assert after.loop == before.loop == 3 and np.array_equal(after.alpha, before.alpha)
    assert before.times == tuple(Fraction(n, 100) for n in (0, 10, 15, 35, 125))
    moved = [abs(a - b) for a, b in zip(before.times, after.times, strict=True)]
    assert max(moved[:-1]) < 0.003
    assert suffix == ".webp" or moved[-1] < 0.003  # it shows the last frame for the average time
    inside = before.alpha[0] == 255
    assert difference(after.frames[0][inside], 255 - before.frames[0][inside]) < 4
