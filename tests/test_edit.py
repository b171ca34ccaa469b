"""edit.py as a user meets it: what comes out lies on what went in, and what cannot be is said in one line."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageCms

import edit
from edit import CLIP_OPTIONS, IMAGE_OPTIONS, Media, MediaError, read_frames, write_clip, write_image

SCRIPT = Path(edit.__file__)


def ffmpeg(*options):
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *map(str, options)], check=True, stdin=subprocess.DEVNULL)


def packets(path, track):
    """Lines of ffmpeg's framecrc: dts, pts, length and checksum of each packet of a track, nothing decoded."""
    command = [get_ffmpeg_exe(), "-v", "error", "-i", path, "-map", f"0:{track}?", "-c", "copy", "-f", "framecrc", "-"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if not line.startswith("#")]


def checksums(path, track="a"):
    return [line.split(",")[5].strip() for line in packets(path, track)]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(height, width, frames=None):
    """A picture that survives JPEG and half-resolution colors; with `frames`, a clip in which it moves."""
    if frames:
        return np.stack([np.roll(smooth(height, width), i, axis=1) for i in range(frames)])
    y, x = np.mgrid[:height, :width]
    waves = [130 + 80 * np.sin(2 * np.pi * x / width) + 40 * np.cos(2 * np.pi * y / height + i / 2) for i in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


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
    """Stands in for the model where only the media count: what it makes of a picture is known exactly."""

    trained = True

    def edit(self, frames, *rest):
        *_, progress, write = rest
        progress("denoise", 1, 1)
        self.frames, self.rest = frames, rest
        for start in (0, *range(1, len(frames), 4)):
            write(255 - frames[start:start + (4 if start else 1)])
            progress("decode", start + 1, len(frames))


@pytest.fixture
def negative(monkeypatch, tmp_path):
    model = Negative()
    monkeypatch.setattr(edit, "load", lambda args: (model, "cpu"))
    monkeypatch.setattr(edit, "parser", lambda made=edit.parser: with_weights(made(), tmp_path))
    return model


def with_weights(parser, folder):
    parser.set_defaults(weights=folder)
    return parser


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """64 x 48, ten frames at 30000/1001 per second, with sound."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x48:rate=30000/1001", "-f", "lavfi", "-i", "sine=440", "-t", "0.33366",
           "-pix_fmt", "yuv420p", "-movflags", "+faststart", path)
    return path


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(smooth(40, 56)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def command(tiny_weights, *arguments, steps=2):
    return [sys.executable, SCRIPT, *map(str, arguments), "--weights", tiny_weights, "--steps", str(steps)]


def test_image_from_a_shell(tiny_weights, photo, tmp_path):
    """What the README shows. stdout must be usable in a script: the path and nothing else."""
    output = tmp_path / "out.jpg"
    done = subprocess.run(command(tiny_weights, photo, "make it night", "-o", output), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{output}\n", done.stderr
    assert Image.open(output).size == (56, 40) and Image.open(output).format == "JPEG"
    rows = [line.split() for line in done.stderr.splitlines()]
    assert [row[0] for row in rows] == ["phase", "load", "understand", "encode", "denoise", "decode", "total"]
    assert all(float(row[2]) > 0.01 for row in rows[1:])                # GB; torch alone takes more


def test_clip_with_sound(tiny_weights, clip, tmp_path, capsys):
    """Wrong rates and lost sound are what users of other editors complain of most."""
    output = tmp_path / "out.mp4"
    code, out, err = run(capsys, clip, "make it night", "-o", output, "--weights", tiny_weights, "--steps", 1)
    source, result = read_frames(clip), read_frames(output)
    assert code == 0 and out == [str(output)] and "frames;" not in err
    assert result.frames.shape == source.frames.shape == (10, 48, 64, 3)
    assert result.fps == source.fps == Fraction(30000, 1001)
    assert checksums(output) == checksums(clip) != []                   # copied, not coded anew


def test_references_and_options_reach_the_model(tiny_weights, photo, tmp_path, capsys):
    """An option that is accepted and ignored shows as the same file."""
    Image.fromarray(noise(24, 40, 3)).save(tmp_path / "a.png")
    Image.fromarray(noise(33, 17, 3, seed=1)).save(tmp_path / "b.png")
    one, two = ("--ref", tmp_path / "a.png"), ("--ref", tmp_path / "a.png", "--ref", tmp_path / "b.png")
    variants = [(), one, two, ("--seed", 1), ("--guidance", 1), ("--shift", 9), ("--steps", 4), ("--solver", "euler"),
                ("--dtype", "bfloat16"), ("--size", "48x40")]
    files = set()
    for extra in variants:
        # Three steps: with two, both solvers are the same.
        code, _, err = run(capsys, photo, "add this", "-o", tmp_path / "out.png", "--weights", tiny_weights, "--steps",
                           3, *extra)
        assert code == 0, err
        files.add((tmp_path / "out.png").read_bytes())
    assert len(files) == len(variants)
    run(capsys, photo, "remove that", "-o", tmp_path / "out.png", "--weights", tiny_weights)
    assert (tmp_path / "out.png").read_bytes() not in files


@pytest.mark.parametrize("name", ["out.png", "out.mp4", "out.mkv", "out.webm"])
def test_same_seed_same_bytes(tiny_weights, photo, clip, tmp_path, name, capsys):
    """Version numbers, dates or random ids in a file would make results impossible to compare."""
    files = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        source = photo if name.endswith("png") else clip
        run(capsys, source, "make it night", "-o", tmp_path / folder / name, "--weights", tiny_weights, "--steps", 1,
            "--frames", 5)
        files.append((tmp_path / folder / name).read_bytes())
    assert files[0] == files[1]


def test_two_processes_write_what_one_does(tiny_weights, clip, tmp_path):
    """Under torchrun one process speaks and writes, and the file is the same."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    files, printed = [], []
    for launcher, name in (([], "one.mkv"), (torchrun, "two.mkv")):
        python, *rest = command(tiny_weights, clip, "x", "-o", tmp_path / name, "--frames", 5, "--device", "cpu")
        done = subprocess.run([*(launcher or [python]), *rest], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        files.append((tmp_path / name).read_bytes())
        printed.append((done.stdout, done.stderr.count("phase ")))
    assert files[0] == files[1] and printed == [(f"{tmp_path / name}\n", 1) for name in ("one.mkv", "two.mkv")]


def test_untrained_weights_are_announced(tiny_weights, photo, tmp_path, capsys):
    """With random queries the result is no edit, which nobody would guess from looking at it."""
    for part in ("mllm", "dit", "vae"):
        shutil.copytree(tiny_weights / part, tmp_path / "weights" / part)
    code, _, err = run(capsys, photo, "x", "-o", tmp_path / "out.png", "--weights", tmp_path / "weights", "--steps", 1)
    assert code == 0 and sum("warning" in line and "random" in line for line in err.splitlines()) == 1


def test_bad_options_are_told_before_torch_is_loaded(tmp_path):
    """Seconds of imports before "no such file" are what a late import avoids; it is undone by one import at the top."""
    code = "import sys, edit\ntry: edit.main(sys.argv[1:])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    for arguments in (["--help"], ["missing.png", "x", "-o", "out.png", "--weights", tmp_path]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=SCRIPT.parent, capture_output=True)
        assert done.returncode == 0
    text = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True).stdout
    options = re.findall(r"^  (?:-o OUTPUT, )?--(\w+)", text, re.MULTILINE)
    plain = {"output", "ref", "compare", "compile", "offload", "quantize", "tile"}                     # these have no default to tell
    assert len(options) == 17 and text.count("(default:") == len(set(options) - plain)


def test_photo_turned_by_exif(negative, tmp_path, capsys):
    """A phone's photo is stored lying; edited so, the model would see it lying, or a viewer turn it twice."""
    exif, pixels = Image.Exif(), smooth(40, 56)
    exif[0x0112], exif[0x010F] = 6, "Maker"                             # turn right by 90 degrees; a tag to be kept
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "in.jpg", exif=exif, icc_profile=profile, quality=100, subsampling=0)
    run(capsys, tmp_path / "in.jpg", "x", "-o", tmp_path / "out.jpg")
    result = Image.open(tmp_path / "out.jpg")
    assert result.size == (40, 56) and result.info["icc_profile"] == profile
    assert result.getexif().get(0x0112, 1) == 1 and result.getexif()[0x010F] == "Maker"
    assert np.abs(np.asarray(result).astype(int) - (255 - np.rot90(pixels, -1))).mean() < 2


def test_alpha(negative, tmp_path, capsys):
    """The model must not see the garbage below transparent pixels, and a cut-out must stay one, without a white rim."""
    color, alpha = smooth(32, 48), noise(32, 48)
    alpha[:16] = 0
    Image.fromarray(np.dstack([color, alpha])).save(tmp_path / "in.png")
    run(capsys, tmp_path / "in.png", "x", "-o", tmp_path / "out.png")
    share = alpha[..., None] / 255
    seen = share * color + (1 - share) * 255
    assert np.abs(negative.frames[0] - seen).max() <= 1
    result = np.asarray(Image.open(tmp_path / "out.png"))
    assert np.array_equal(result[..., 3], alpha)
    on_white = result[..., 3:] / 255 * result[..., :3] + (1 - share) * 255
    possible = (alpha > 0)[..., None] & (255 - seen >= (1 - share) * 255)   # darker than any color on white would be
    assert np.abs(on_white - (255 - seen))[np.broadcast_to(possible, seen.shape)].max() <= 1.5
    run(capsys, tmp_path / "in.png", "x", "-o", tmp_path / "out.jpg")
    assert Image.open(tmp_path / "out.jpg").mode == "RGB"


def grey16(path):
    Image.fromarray(np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)).save(path)
    return np.repeat(np.linspace(0, 255, 32 * 48).reshape(32, 48, 1), 3, axis=2)


def converted(mode):
    def write(path):
        image = Image.fromarray(smooth(32, 48)).convert(mode)
        image.save(path)
        return np.asarray(image.convert("RGB"))
    return write


def palette_with_transparency(path):
    image = Image.fromarray(smooth(32, 48)).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(path, transparency=image.getpixel((0, 0)))
    rgba = np.asarray(Image.open(path).convert("RGBA"))
    return np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])


@pytest.mark.parametrize("suffix, write", [
    (".png", grey16), (".tif", grey16), (".png", converted("L")), (".png", converted("1")), (".gif", converted("P")),
    (".png", palette_with_transparency), (".tif", converted("CMYK")), (".bmp", converted("RGB")),
    (".webp", converted("RGB"))])
def test_kinds_of_pixels(tmp_path, suffix, write):
    """PIL's convert("RGB") alone turns 16-bit grey white, and shows what is below transparent pixels."""
    expected = write(tmp_path / f"in{suffix}")
    media = read_frames(tmp_path / f"in{suffix}")
    assert not media.is_video and media.frames.shape == (1, 32, 48, 3) and media.frames.dtype == np.uint8
    assert np.abs(media.frames[0] - expected.astype(float)).mean() < (4 if suffix == ".webp" else 1)


def test_content_tells_not_the_name(negative, clip, photo, tmp_path, capsys):
    """Downloads are often misnamed: a clip called .jpg is a clip."""
    shutil.copy(clip, tmp_path / "clip.jpg")
    shutil.copy(photo, tmp_path / "photo.mp4")
    assert run(capsys, tmp_path / "clip.jpg", "x", "-o", tmp_path / "a.mp4")[0] == 0
    assert run(capsys, tmp_path / "photo.mp4", "x", "-o", tmp_path / "a.png")[0] == 0


def test_size_and_compare(negative, photo, clip, tmp_path, capsys):
    """--compare must show what was edited, and leave OUTPUT what it is without."""
    code, out, _ = run(capsys, photo, "x", "-o", tmp_path / "a.png", "--size", "32x24", "--compare")
    left, right = np.split(np.asarray(Image.open(tmp_path / "a_compare.png")), 2, axis=1)
    assert code == 0 and out == [str(tmp_path / "a.png"), str(tmp_path / "a_compare.png")]
    assert left.shape == (24, 32, 3) and np.array_equal(left, 255 - right)
    assert np.array_equal(right, np.asarray(Image.open(tmp_path / "a.png")))
    run(capsys, clip, "x", "-o", tmp_path / "a.mp4", "--size", "32x24", "--compare")
    assert read_frames(tmp_path / "a_compare.mp4").frames.shape == (10, 24, 64, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("rate", ["24000/1001", "30000/1001", "25", "12", "50/3", "120000/1001"])
def test_exact_frame_rate(tmp_path, suffix, rate):
    """29.97 for 30000/1001 drifts from the sound by a frame in half a minute; Matroska stores rounded milliseconds."""
    frames = smooth(32, 48, frames=7)
    write_clip(tmp_path / f"a{suffix}", frames, Fraction(rate))
    media = read_frames(tmp_path / f"a{suffix}", limit=5)
    assert (media.fps, media.steady, media.total, len(media.frames)) == (Fraction(rate), True, 7, 5)


@pytest.mark.parametrize("suffix", CLIP_OPTIONS)
@pytest.mark.parametrize("shape", [(5, 32, 48), (5, 33, 47), (1, 32, 48)])
def test_every_format_keeps_size_and_number_of_frames(tmp_path, suffix, shape):
    """H.264 with halved colors refuses odd sides, and other writers round sides up to 16."""
    frames = smooth(*shape[1:], frames=shape[0])
    write_clip(tmp_path / f"a{suffix}", frames, 10)
    media = read_frames(tmp_path / f"a{suffix}")
    assert media.frames.shape == frames.shape
    assert shape[0] == 1 or media.fps == 10
    limit = {".png": 0, ".gif": 12, ".webp": 8}.get(suffix, 4)          # APNG is lossless
    assert np.abs(media.frames.astype(int) - frames).mean() <= limit


def test_longer_clips_are_cut_aloud(negative, clip, tmp_path, capsys):
    """750 frames read without a word is a complaint; a cut clip with its whole sound is another."""
    code, _, err = run(capsys, clip, "x", "-o", tmp_path / "out.mp4", "--frames", 4)
    assert code == 0 and re.search(r"has 10 frames; the first 4 are", err)
    assert len(read_frames(tmp_path / "out.mp4").frames) == 4
    sound = checksums(tmp_path / "out.mp4")
    assert sound == checksums(clip)[:len(sound)]
    assert 4 / 29.97 <= len(sound) * 1024 / 44100 < 4 / 29.97 + 3 * 1024 / 44100


def test_sound_that_the_format_cannot_hold(negative, clip, tmp_path, capsys):
    """AAC cannot be in WebM: the copy fails, and without a second try the work would be lost."""
    code, _, err = run(capsys, clip, "x", "-o", tmp_path / "out.webm")
    assert code == 0 and len(packets(tmp_path / "out.webm", "a")) > 10
    code, _, err = run(capsys, clip, "x", "-o", tmp_path / "out.gif")
    assert code == 0 and "no sound" in err


def test_sound_that_starts_before_the_pictures(clip, tmp_path):
    """The first frame is moved to time 0; sound that is not moved along would be late for the whole clip."""
    ffmpeg("-itsoffset", 0.2, "-i", clip, "-i", clip, "-map", "0:v", "-map", "1:a", "-c", "copy", tmp_path / "late.mp4")
    media = read_frames(tmp_path / "late.mp4")
    write_clip(tmp_path / "out.mp4", media.frames, media.fps, media)
    before, after = (int(packets(tmp_path / name, "a")[0].split(",")[2]) / 44100 for name in ("late.mp4", "out.mp4"))
    assert media.delay == pytest.approx(0.2, abs=1e-3) and after - before == pytest.approx(-0.2, abs=1e-3)


def test_clip_turned_by_its_metadata(negative, clip, tmp_path, capsys):
    """A phone's clip is stored lying, as its photos are."""
    ffmpeg("-display_rotation", 90, "-i", clip, "-c", "copy", tmp_path / "turned.mp4")
    run(capsys, tmp_path / "turned.mp4", "x", "-o", tmp_path / "out.mp4")
    expected = 255 - np.rot90(read_frames(clip).frames, 1, axes=(1, 2))
    result = read_frames(tmp_path / "out.mp4").frames
    assert result.shape == (10, 64, 48, 3) and np.abs(result.astype(int) - expected).mean() < 12


def test_pixels_that_are_not_square(negative, clip, tmp_path, capsys):
    """Clips from tape and disc are stored narrower than they are shown: without a word of it they stay narrow."""
    ffmpeg("-i", clip, "-vf", "setsar=5/4", tmp_path / "wide.mp4")
    for suffix in (".mp4", ".mkv", ".webm", ".mov"):
        assert run(capsys, tmp_path / "wide.mp4", "x", "-o", tmp_path / f"out{suffix}", "--frames", 2)[0] == 0
        assert read_frames(tmp_path / f"out{suffix}").aspect == "5:4"
    assert read_frames(clip).aspect is None and read_frames(tmp_path / "wide.mp4", size=(32, 24)).aspect is None


def test_frames_that_cannot_be_decoded(negative, tmp_path, capsys):
    """Fewer frames than the file lists: --frames has nothing to do with it."""
    for name, size in (("a", "64x64"), ("b", "96x64")):
        source = ("-f", "lavfi", "-i", f"testsrc=size={size}:rate=25", "-t", "0.2")
        ffmpeg(*source, "-c:v", "mpeg2video", tmp_path / f"{name}.ts")
    (tmp_path / "ab.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    code, _, err = run(capsys, tmp_path / "ab.ts", "x", "-o", tmp_path / "out.mp4")
    assert code == 0 and "has 10 frames, of which 9 can be decoded" in err and "--frames" not in err


def test_varying_frame_rate(negative, tmp_path, capsys):
    """Frames are neither doubled nor dropped; at the average rate the clip stays as long as its sound."""
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x48:rate=30", "-t", 1, "-vf", "select='not(mod(n,3))+gt(n,15)'",
           "-fps_mode", "vfr", "-pix_fmt", "yuv420p", tmp_path / "vfr.mp4")
    code, _, err = run(capsys, tmp_path / "vfr.mp4", "x", "-o", tmp_path / "out.mp4")
    source, result = read_frames(tmp_path / "vfr.mp4"), read_frames(tmp_path / "out.mp4")
    assert code == 0 and "varying frame rate" in err and not source.steady and result.steady
    assert len(result.frames) == len(source.frames) < 30
    assert len(result.frames) / result.fps == pytest.approx(1, abs=0.05)


def test_colors_go_back_as_they_came(tmp_path):
    """HD clips code colors by another formula than ffmpeg assumes when it is not told: reds and greens would shift."""
    colors = ("bt709", "bt709", "bt709")
    for suffix in (".mp4", ".webm"):
        frames = smooth(48, 64, frames=3)
        write_clip(tmp_path / f"a{suffix}", frames, 10, Media(tmp_path, frames, colors=colors))
        media = read_frames(tmp_path / f"a{suffix}")
        assert media.colors == colors and np.abs(media.frames.astype(int) - frames).mean() < 4


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_clips_do_not_get_darker(tmp_path, suffix):
    """ffmpeg's quick conversion between RGB and YUV takes a level off each time: an edit would be seen to fade."""
    ramp = np.broadcast_to(np.linspace(20, 235, 64).round().astype(np.uint8)[:, None], (2, 48, 64, 3))
    write_clip(tmp_path / f"a{suffix}", ramp, 10)
    assert abs((read_frames(tmp_path / f"a{suffix}").frames.astype(int) - ramp).mean()) < 0.3


def test_animations_are_clips(negative, tmp_path, capsys):
    """PIL opens a GIF as an image: its other frames would be dropped without a word."""
    frames = [Image.fromarray(frame) for frame in smooth(32, 48, frames=4)]
    for suffix in (".gif", ".webp", ".png"):
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], duration=80)
        code, _, err = run(capsys, tmp_path / f"a{suffix}", "x", "-o", tmp_path / "out.mp4", "--frames", 3)
        media = read_frames(tmp_path / "out.mp4")
        assert code == 0 and "has 4 frames; the first 3" in err and media.fps == Fraction(25, 2)
        assert negative.frames.shape == (3, 32, 48, 3)


def test_one_frame_clip(negative, clip, tmp_path, capsys):
    """It is edited as an image, but stays a clip."""
    ffmpeg("-i", clip, "-frames:v", 1, "-an", tmp_path / "one.mp4")
    assert run(capsys, tmp_path / "one.mp4", "x", "-o", tmp_path / "out.mp4")[0] == 0
    media = read_frames(tmp_path / "out.mp4")
    assert media.is_video and media.frames.shape == (1, 48, 64, 3) and media.fps == Fraction(30000, 1001)


def test_folder_of_frames(tmp_path):
    """Training data come as folders of frames, in the order of their names."""
    frames = noise(3, 16, 24, 3)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i:03}.png")
    media = read_frames(tmp_path, limit=2)
    assert np.array_equal(media.frames, frames[:2]) and (media.total, media.is_video) == (3, True)
    assert read_frames(tmp_path, size=(12, 8)).frames.shape == (3, 8, 12, 3)


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
        ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x48:rate=25", "-t", 1, *options, "-f", container, path)
        path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])
    return write


def clip_of(frames):
    source = ("-f", "lavfi", "-i", "testsrc=size=64x48:rate=25")
    return lambda path: ffmpeg(*source, "-frames:v", frames, "-f", "mp4", path)


def huge(path):
    Image.new("1", (30000, 30000)).save(path, "PNG")


def sound_only(path):
    ffmpeg("-f", "lavfi", "-i", "sine=440", "-t", 0.2, "-f", "mp4", path)


def animation(path):
    frames = [Image.fromarray(noise(32, 32, 3, seed=i)) for i in range(3)]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


FINE = png(32, 32)
BAD = {  # name: (input, arguments, what must be said)
    "missing input": (None, [], "does not exist"),
    "empty file": (lambda path: path.touch(), [], "neither an image nor a video"),
    "text": (text, [], "neither an image nor a video"),
    "no frame in it": (clip_of(0), [], "neither an image nor a video"),
    "900 million pixels": (huge, [], "more than 179 million pixels"),
    "playlist": (playlist, [], "neither an image nor a video"),
    "sound": (sound_only, [], "neither an image nor a video"),
    "folder": (lambda path: path.mkdir(), [], "is a folder"),
    "truncated PNG": (cut_image("PNG"), [], "truncated"),
    "truncated JPEG": (cut_image("JPEG"), [], "truncated"),
    "truncated WebP": (cut_image("WEBP"), [], "truncated|neither"),
    "truncated MP4": (cut_clip("mp4"), [], "damaged"),
    "truncated MP4 that starts well": (cut_clip("mp4", "-movflags", "+faststart"), [], "truncated"),
    "truncated MKV": (cut_clip("matroska"), [], "truncated"),
    "HEIC": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100)), [], "HEIC.* convert"),
    "1x1": (png(1, 1), [], "too small.* 16"),
    "narrow": (png(16, 3200), [], "too narrow.* 200"),
    "panorama": (png(500, 20000), [], r"too large.* 8192 .*--size 8192x204"),
    "large": (png(4200, 4200), [], r"too large.*--size 4096x4096"),
    "size too small": (FINE, ["--size", "8x8"], "too small"),
    "size too large": (FINE, ["--size", "9000x100"], "too large"),
    "size of another form": (FINE, ["--size", "832"], "'832' is not a size such as 832x480"),
    "no frames": (FINE, ["--frames", "0"], "'0' is not a whole number from 1"),
    "steps 0": (FINE, ["--steps", "0"], "--steps.*'0' is not a whole number from 1"),
    "steps 2.5": (FINE, ["--steps", "2.5"], "--steps.*whole number"),
    "guidance NaN": (FINE, ["--guidance", "nan"], "--guidance.*'nan' is not a number from 1"),
    "guidance infinite": (FINE, ["--guidance", "inf"], "--guidance"),
    "guidance negative": (FINE, ["--guidance", "-1"], "--guidance"),
    "shift negative": (FINE, ["--shift", "-2"], "--shift"),
    "seed negative": (FINE, ["--seed", "-1"], "--seed"),
    "solver unknown": (FINE, ["--solver", "magic"], "--solver.*unipc"),
    "option unknown": (FINE, ["--negative", "x"], "--negative"),
    "empty instruction": (FINE, ["  "], "instruction is empty"),
    "reference is a clip": (FINE, ["--ref", animation], "is a clip"),
    "reference is a folder": (FINE, ["--ref", lambda path: path.mkdir()], "folder"),
    "reference is text": (FINE, ["--ref", text], "neither"),
    "reference is missing": (FINE, ["--ref", "missing.png"], "missing.png does not exist"),
    "reference too small": (FINE, ["--ref", png(2, 2)], "too small"),
    "no weights": (FINE, ["--weights", "nowhere"], "nowhere: there is no such folder"),
    "extension unknown": (FINE, ["-o", "out.xyz"], r"no known extension.*\.mp4"),
    "no extension": (FINE, ["-o", "out"], "no known extension"),
    "image to a clip's extension": (FINE, ["-o", "out.mp4"], r"is an image, which .mp4 cannot hold; .png .jpg"),
    "clip to an image's extension": (animation, ["-o", "out.jpg"], r"is a clip, which .jpg cannot hold; .mp4"),
    "comparison too wide": (png(48, 8192), ["-o", "out.webp", "--compare"], r"16384 pixels wide.*\.png"),
    "output folder missing": (FINE, ["-o", "no/such/out.png"], "no folder"),
    "output is a folder": (FINE, ["-o", "taken.png"], "taken.png is a folder"),
    "output folder read-only": (FINE, ["-o", "/proc/out.png"], "/proc/out.png cannot be written"),
    "output name too long": (FINE, ["-o", "a" * 250 + ".png"], "cannot be written.* too long"),
    "output is the input": (FINE, ["-o", "input.png"], "input.png is an input"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, monkeypatch, tmp_path, capsys):
    """A traceback, a usage page or a half-written file instead of the reason; or the reason only after the work."""
    make, arguments, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edit, "load", lambda args: pytest.fail("this should be seen before a model is loaded"))
    Path("taken.png").mkdir()
    if make:
        make(Path("input.png"))
    arguments = [word if isinstance(word, str) else word(Path("extra")) or "extra" for word in arguments]
    instruction = [] if case == "empty instruction" else ["make it night"]
    before = set(tmp_path.rglob("*"))
    code, out, err = run(capsys, "input.png", *instruction, "-o", "out.png", "--weights", tmp_path, *arguments)
    assert code == 2 and not out
    assert err.startswith("edit.py: error: ") and err.count("\n") == 1 and re.search(said, err), err
    assert set(tmp_path.rglob("*")) == before


def test_no_input_is_lost(negative, tmp_path, capsys):
    """A reference, or an input that is named as --compare names its file, must not be written over either."""
    for name in ("a.png", "b.png", "b_compare.png"):
        png(32, 32)(tmp_path / name)
    (tmp_path / "c_compare.png").mkdir()
    a, b, b_compare = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "b_compare.png"
    for arguments, said in (((a, "x", "-o", b, "--ref", b), "b.png is an input"),
                            ((b_compare, "x", "-o", b, "--compare"), "b_compare.png is an input"),
                            ((a, "x", "-o", tmp_path / "c.png", "--compare"), "c_compare.png is a folder")):
        code, out, err = run(capsys, *arguments)
        assert code == 2 and not out and err.count("\n") == 1 and said in err
    assert len(list(tmp_path.iterdir())) == 4 and {Image.open(path).size for path in (b, b_compare)} == {(32, 32)}


def remove(name):
    return lambda folder: (folder / name).unlink()


def shorten(name, keep=0.5):
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * keep))


def overwrite(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize("damage, said", [
    (lambda folder: shutil.rmtree(folder / "dit"), "dit"),
    (lambda folder: shutil.rmtree(folder / "mllm"), "mllm"),
    (lambda folder: shutil.rmtree(folder / "vae"), "vae"),
    (remove("mllm/tokenizer.json"), "tokenizer.json"),
    (remove("instructx/model.safetensors"), "instructx/model.safetensors"),
    (remove("instructx/config.json"), "instructx"),
    (shorten("mllm/model.safetensors"), "mllm"),
    (shorten("vae/model.safetensors"), "vae"),
    (shorten("instructx/model.safetensors"), "instructx"),
    (shorten("instructx/config.json"), "instructx/config.json"),
    (overwrite("instructx/config.json", "[]"), "instructx/config.json"),
    (overwrite("instructx/config.json", '{"lora": 3}'), "lora"),
    (overwrite("dit/config.json", "not json"), "dit/config.json"),
    (overwrite("vae/config.json", "[]"), "vae/config.json"),
    (overwrite("mllm/config.json", "not json"), "mllm/config.json")])
def test_bad_weights_are_one_clear_line(damage, said, tiny_weights, photo, tmp_path, capsys):
    """An interrupted download is common; it must be told by name, and not by a traceback or by a random model."""
    shutil.copytree(tiny_weights, tmp_path / "weights")
    damage(tmp_path / "weights")
    code, out, err = run(capsys, photo, "x", "-o", tmp_path / "out.png", "--weights", tmp_path / "weights")
    assert code == 2 and not out and not (tmp_path / "out.png").exists()
    assert err.startswith("edit.py: error: ") and err.count("\n") == 1 and said in err, err


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta:x"])
def test_device_that_is_not_there(device, tiny_weights, photo, tmp_path, capsys):
    """Torch's own words for this run over many lines."""
    code, _, err = run(capsys, photo, "x", "-o", tmp_path / "o.png", "--weights", tiny_weights, "--device", device)
    assert code == 2 and err.count("\n") == 1 and f"--device {device} is not available" in err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to\nallocate 2 GiB")])
def test_out_of_memory(negative, photo, tmp_path, error, monkeypatch, capsys):
    """The most common failure of all on a GPU: it should say what helps. Other errors of torch are bugs, and shown."""
    def fail(*arguments):
        raise error
    monkeypatch.setattr(negative, "edit", fail)
    code, _, err = run(capsys, photo, "x", "-o", tmp_path / "out.png")
    assert code == 2 and err == "edit.py: error: out of memory; a smaller --size or fewer --frames need less\n"
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(capsys, photo, "x", "-o", tmp_path / "out.png")


def test_interrupt_leaves_nothing(tiny_weights, clip, tmp_path):
    """Ctrl-C in the middle of an edit: no traceback, exit code 130 as a shell expects, and the old file as it was."""
    output = tmp_path / "out.mp4"
    output.write_bytes(b"the result of an earlier run")
    hears = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)        # what a shell runs in the background does not
    process = subprocess.Popen(command(tiny_weights, clip, "x", "-o", output, "--frames", 9, steps=1000), text=True,
                               stderr=subprocess.PIPE, preexec_fn=hears)
    assert "has 10 frames" in process.stderr.readline()                 # from here on it works for a minute
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and process.stderr.read() == "edit.py: interrupted\n"
    assert os.listdir(tmp_path) == ["out.mp4"] and output.read_bytes() == b"the result of an earlier run"


@pytest.mark.parametrize("name", ["out.mp4", "out.png"])
def test_interrupt_while_writing_leaves_nothing(negative, clip, tmp_path, name, monkeypatch, capsys):
    """A half-written file under the final name looks like a result."""
    def interrupt(self, phase, done, total):
        self.phase = None
        if (phase, done) == ("decode", 6):
            raise KeyboardInterrupt
    monkeypatch.setattr(edit.Phases, "__call__", interrupt)
    code, out, _ = run(capsys, clip, "x", "-o", tmp_path / name)
    assert code == 130 and not out and not os.listdir(tmp_path)


def test_writing_that_fails(tmp_path):
    """ffmpeg's failure must be raised, not only logged, and leave no temporary file."""
    frames = smooth(32, 48, frames=3)
    with pytest.raises(OSError, match="could not be written"):
        write_clip(tmp_path / "no" / "such" / "out.mp4", frames, 10)
    assert not list(tmp_path.iterdir())


def test_not_a_folder_of_frames(tmp_path):
    """Frames of different sizes cannot be one clip."""
    with pytest.raises(MediaError, match="folder"):
        read_frames(tmp_path)
    png(16, 16)(tmp_path / "a.png"), png(16, 24)(tmp_path / "b.png")
    for size in (None, (16, 16)):       # scaled to one size they would be another clip, of things that jump
        with pytest.raises(MediaError, match="one size"):
            read_frames(tmp_path, size=size)


def test_every_image_format(tmp_path):
    """An extension that is offered must be written."""
    for suffix in IMAGE_OPTIONS:
        write_image(tmp_path / f"a{suffix}", smooth(33, 47))
        assert np.abs(read_frames(tmp_path / f"a{suffix}").frames[0].astype(int) - smooth(33, 47)).mean() < 8
    with contextlib.suppress(FileNotFoundError):
        write_image(tmp_path / "no" / "a.png", smooth(33, 47))
