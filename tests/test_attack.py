"""tests/attack.py: what it counts as held, and that it sees a program that does not hold."""

import re
import time

import attack
import pytest

import edit


def table(capsys):
    """What was printed -> {attack: (tried, held, refused)}, the lines before the table."""
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(next(line for line in lines if line.startswith("attack ")))
    rows = {name: tuple(map(int, more[:3])) for name, *more in map(str.split, lines[start + 1 :])}
    return rows, lines[:start]


def test_a_few_cases_of_each(capsys):
    """Those of media, configs and data: whatever is damaged, nothing ends in a traceback."""
    assert attack.main(["media", "configs", "data", "--count", "5", "--seed", "3"]) == 0
    rows, lines = table(capsys)
    assert not lines and {name: row[:2] for name, row in rows.items()} == {
        "media": (5, 5),
        "configs": (5, 5),
        "data": (5, 5),
    }


@pytest.mark.slow
def test_a_killed_training(capsys):
    """It is started again until it is done, and has the weights of one in peace."""
    assert attack.main(["kills", "--count", "20", "--seed", "3"]) == 0
    assert table(capsys)[0] == {"kills": (1, 1, 0)}


def test_what_is_not_damaged_works(monkeypatch, capsys):
    """Files that are refused for another reason would hold whatever the damage."""
    for name in ("damage", "damage_json", "damage_weights"):
        monkeypatch.setattr(attack, name, lambda content, *others: content)
    monkeypatch.setattr(attack, "ENCODINGS", ())
    assert attack.main(["media", "configs", "data", "--count", "6"]) == 0
    assert [row[1:] for row in table(capsys)[0].values()] == [(6, 0)] * 3


def fails(path, *_, **__):
    raise KeyError(path)


def says_more(path, *_, **__):
    print("Traceback")
    raise edit.MediaError(f"{path} is damaged")


def names_nothing(path, *_, **__):
    raise edit.MediaError("it is damaged")


def leaves_a_file(path, *_, **__):
    path.with_name("left.partial").touch()
    raise edit.MediaError(f"{path} is damaged")


def hangs(path, *_, **__):
    time.sleep(60)


def takes_memory(path, *_, **__):
    raise edit.MediaError(f"{path} has {len(bytearray(attack.MEMORY))} bytes")


def cuts(path, *arguments, **named):
    media = read_frames(path, *arguments, **named)
    media.frames = media.frames[:, :-1]
    return media


read_frames = edit.read_frames


@pytest.mark.parametrize(
    "reader, said",
    [
        (fails, "code 1: .*KeyError"),
        (says_more, "not one line"),
        (names_nothing, "names no file"),
        (leaves_a_file, "left over.*left.partial"),
        (hangs, "code -9"),
        (takes_memory, "names no file.*memory"),
        (cuts, "code 1: .*should be"),
    ],
)
def test_a_broken_reader_does_not_hold(monkeypatch, capsys, reader, said):
    """A tool that counts everything as held would say the same of any program."""
    monkeypatch.setattr(attack, "damage", lambda content, *others: content)
    monkeypatch.setattr(attack, "LIMIT", 2)
    monkeypatch.setattr(edit, "read_frames", reader)
    assert attack.main(["media", "--count", "1"]) == 1
    rows, lines = table(capsys)
    assert rows["media"][:2] == (1, 0)
    assert re.search(said, lines[0]), lines


def test_a_case_can_be_repeated(monkeypatch, capsys):
    """By the line that reports it, alone and with all that was said."""
    monkeypatch.setattr(edit, "read_frames", fails)
    assert attack.main(["media", "--count", "9", "--seed", "4"]) == 1
    line = table(capsys)[1][-1]
    words = line.partition(":")[0].split()
    assert attack.main(words) == 1
    again = table(capsys)[1]
    assert again[0].split(":")[1] == line.split(":")[1] and len(again) > 3
