"""Corruptions by kind of file: each takes the bytes of a whole file and a random source, and returns a name with other bytes, or with a
function that fills the emptied place.

A name that begins with `same` is of a change that must not matter: the command ends as with the whole file.
"""

import gzip
import io
import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

Corruption = tuple[str, bytes | Callable[[Path], None]]
Mutator = Callable[[bytes, Random], Corruption]

NUMBERS = (0, -1, 1, 2, 3, 7, 2.5, 1e308, -1e308, math.nan, math.inf, 10**12, 2**31, 2**63, 10**30, -(2**63))
VALUES = (
    *NUMBERS,
    None,
    True,
    False,
    "",
    "x",
    "8",
    "etc/passwd",
    "\ud800",
    "\x00",
    "é" * 3000,
    [],
    {},
    [[]],
    [None],
    {"x": 1},
    ["x"] * 3,
)


def json_file(data: bytes, random: Random) -> Corruption:
    """Change one value, key or the text of a JSON file."""
    if random.random() < 0.2:
        return json_text(data, random)
    tree = json.loads(data)
    places = [place for place in _places(tree) if place]
    if not places:
        return json_text(data, random)
    name, change = random.choice(_CHANGES)
    place = random.choice(places)
    holder = tree
    for step in place[:-1]:
        holder = holder[step]
    change(holder, place[-1], random, tree)
    dotted = ".".join(map(str, place))
    return f"{name} {dotted[:60]}", _dumped(tree)


def json_text(data: bytes, random: Random) -> Corruption:
    """Change the text of a JSON file, not its values."""
    tree = json.loads(data)
    deep = random.choice((500, 5_000, 200_000))
    choices: tuple[tuple[str, Callable[[], bytes]], ...] = (
        ("same indentation", lambda: json.dumps(tree, indent=7, ensure_ascii=False).encode()),
        ("same without spaces", lambda: json.dumps(tree, separators=(",", ":")).encode()),
        ("same spaces around", lambda: b" \n\t" + data + b"\n\n "),
        ("empty", lambda: b""),
        ("zeros", lambda: bytes(len(data))),
        ("truncated", lambda: data[: random.randrange(len(data))]),
        ("trailing", lambda: data + b"}"),
        ("twice", lambda: data + data),
        ("byte order mark", lambda: b"\xef\xbb\xbf" + data),
        ("utf-16", lambda: data.decode().encode("utf-16")),
        ("latin-1", lambda: data[:-2] + b',"\xe9": 1}'),
        ("list", lambda: b"[" + data + b"]"),
        ("null", lambda: b"null"),
        ("number", lambda: b"1" * random.choice((3, 5000))),
        ("nested", lambda: b"[" * deep + b"]" * deep),
        ("nested value", lambda: _with(data, b'"nested": ' + b'{"x":' * deep + b"1" + b"}" * deep)),
        ("long integer", lambda: _with(data, b'"long": ' + b"9" * 5000)),
        ("surrogate key", lambda: _with(data, b'"\\ud800": "\\udfff"')),
        ("bytes", lambda: flipped(data, random)[1]),
    )
    name, make = random.choice(choices)
    return f"{name} text", make()


def header(data: bytes, random: Random) -> Corruption:
    """Change the header of a safetensors file, its length or its data."""
    length = struct.unpack("<Q", data[:8])[0]
    entries, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = random.randrange(10)
    if kind == 0:
        other = random.choice((0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, len(data)))
        return "header length", struct.pack("<Q", other) + data[8:]
    if kind == 1:
        return "truncated file", data[: random.randrange(len(data))]
    if kind == 2:
        return "longer file", data + bytes(random.choice((1, 8, 4096)))
    if kind == 3:
        name, text = json_text(json.dumps(entries).encode(), random)
        # The official reader takes no spaces before the header.
        return f"header {name}".replace("header same", "header"), _safetensors(text, rest)
    if kind == 4:
        shuffled = dict(random.sample(sorted(entries.items(), key=lambda item: item[0]), len(entries)))
        return "same order of header", _safetensors(json.dumps(shuffled).encode(), rest)
    if kind == 5:
        entries["__metadata__"] = random.choice(({}, {"format": "pt", "x": "y"}, {"x": 1}, "x", None, [], {"x": None}))
        return "header metadata", _safetensors(json.dumps(entries).encode(), rest)
    if kind == 6:
        return "header bytes", data[:8] + flipped(data[8 : 8 + length], random)[1] + rest
    name = random.choice([name for name in entries if name != "__metadata__"])
    entry = entries[name]
    if kind == 7:
        text, changed = json_file(json.dumps(entries).encode(), random)
        return f"header {text}".replace("header same", "header"), _safetensors(changed, rest)
    if kind == 8:
        other = random.choice([other for other in entries if other != "__metadata__"])
        entries[name], entries[other] = entries[other], entry
        return "header swapped tensors", _safetensors(json.dumps(entries).encode(), rest)
    shape = [
        dim if random.random() < 0.5 else random.choice((*NUMBERS, float(dim), True, str(dim), -dim))
        for dim in entry["shape"]
    ]
    entry["shape"] = random.choice((shape, [*entry["shape"], 1], entry["shape"][::-1], [math.prod(entry["shape"])]))
    return "header shape", _safetensors(_dumped(entries), rest)


def numbers(data: bytes, random: Random) -> Corruption:
    """Change the numbers of one tensor of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    name = random.choice([name for name in entries if name != "__metadata__"])
    start, end = (8 + length + at for at in entries[name]["data_offsets"])
    raw, code = data[start:end], entries[name]["dtype"]
    if code not in _ENCODED:
        return f"bytes {name}", data[:start] + flipped(raw, random)[1] + data[end:]
    what = random.choice(sorted(_ENCODED[code]))
    number = _ENCODED[code][what]
    if random.random() < 0.5:
        return f"{what} {name}", data[:start] + number * (len(raw) // len(number)) + data[end:]
    at = random.randrange(len(raw) // len(number)) * len(number)
    return f"one {what} {name}", data[:start] + raw[:at] + number + raw[at + len(number) :] + data[end:]


def text(data: bytes, random: Random) -> Corruption:
    """Change a file of text or lines."""
    lines = data.splitlines(keepends=True)
    one = random.choice(lines or [b"\n"])
    choices: tuple[tuple[str, Callable[[], bytes]], ...] = (
        ("empty", lambda: b""),
        ("blank", lambda: b"\n \n\t\n" * 40),
        ("one byte", lambda: b"x"),
        ("zeros", lambda: bytes(len(data))),
        ("truncated", lambda: data[: random.randrange(len(data) or 1)]),
        ("no line breaks", lambda: data.replace(b"\n", b"")),
        ("other line breaks", lambda: data.replace(b"\n", b"\r\n")),
        ("utf-16", lambda: data.decode(errors="replace").encode("utf-16")),
        ("not text", lambda: random.randbytes(3000)),
        ("latin-1", lambda: b"caf\xe9 " * 100),
        ("surrogates", lambda: b"\xed\xa0\x80" * 100),
        ("one repeated", lambda: one * 60),
        ("unknown letters", lambda: "Ψωж漢😀".encode() * 400),
        ("special tokens", lambda: b"</s>" * 900),
        ("long line", lambda: b"a" * 2_000_000),
        ("bytes", lambda: flipped(data, random)[1]),
        ("lines out of order", lambda: b"".join(random.sample(lines, len(lines)))),
        ("line removed", lambda: b"".join(lines[: len(lines) // 2] + lines[len(lines) // 2 + 1 :])),
    )
    name, make = random.choice(choices)
    return name, make()


def lines(data: bytes, random: Random) -> Corruption:
    """Change a file of JSON lines: one of its records, or its text."""
    if random.random() < 0.4:
        return text(data, random)
    whole = data.splitlines()
    at = random.randrange(len(whole))
    name, changed = json_file(whole[at], random)
    every = random.random() < 0.3
    whole = (
        [changed.replace(b"\n", b" ")] * len(whole)
        if every
        else [*whole[:at], changed.replace(b"\n", b" "), *whole[at + 1 :]]
    )
    return f"record {name}".replace("record same", "record"), b"\n".join(whole) + b"\n"


def card(data: bytes, random: Random) -> Corruption:
    """Change a model card: its metadata or its text."""
    front = random.choice(_FRONTS)
    return random.choice(
        (("same card", front + data), ("same card", flipped(data, random)[1]), ("same card", front), ("same card", b""))
    )


def packed(data: bytes, random: Random) -> Corruption:
    """Change a compressed file or a table."""
    if data[:2] == b"\x1f\x8b" and random.random() < 0.4:
        name, changed = text(gzip.decompress(data), random)
        return f"packed {name}", gzip.compress(changed, mtime=0)
    return random.choice((flipped, _cut, _torn))(data, random)


def flipped(data: bytes, random: Random) -> Corruption:
    """Change a few bytes anywhere."""
    changed = bytearray(data or b"\0")
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return "bytes", bytes(changed)


def entry(data: bytes, random: Random) -> Corruption:
    """Put something else than a file into its place."""

    def link(to: str) -> Callable[[Path], None]:
        return lambda path: path.symlink_to(to)

    return random.choice((
        ("nothing", lambda path: None), ("directory", Path.mkdir), ("pipe", os.mkfifo), ("link to a device", link("/dev/zero")),
        ("link to nothing", link("/dev/null")), ("link to itself", lambda path: path.symlink_to(path.name)), 
        ("dangling link", link("gone")),
        ("link to a system file", link("/etc/passwd")), ("link to the terminal", link("/dev/tty")), ("link to a directory", link(".")),
    ))  # fmt: skip


class _Planted:
    """What runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/headfold-owned",)


def planted(data: bytes, random: Random) -> Corruption:
    """Replace a file of an unfinished run by one that runs code where it is unpickled, or change its bytes."""
    if random.random() < 0.5:
        return flipped(data, random)
    as_torch = io.BytesIO()
    torch.save({"model": _Planted(), "step": _Planted()}, as_torch)
    return random.choice(
        (
            ("pickle", pickle.dumps(_Planted())),
            ("torch file", as_torch.getvalue()),
            ("empty", b""),
            _cut(data or b"\0", random),
        )
    )


def _cut(data: bytes, random: Random) -> Corruption:
    return "truncated", data[: random.randrange(len(data))]


def _torn(data: bytes, random: Random) -> Corruption:
    at, size = random.randrange(len(data)), random.randrange(1, 200)
    return "hole", data[:at] + data[at + size :]


def _replaced(holder: Any, key: Any, random: Random, tree: Any) -> None:
    holder[key] = random.choice(VALUES)


def _removed(holder: Any, key: Any, random: Random, tree: Any) -> None:
    del holder[key]


def _near(holder: Any, key: Any, random: Random, tree: Any) -> None:
    value = holder[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    holder[key] = (
        random.choice((value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)))
        if number
        else [value]
    )


def _renamed(holder: Any, key: Any, random: Random, tree: Any) -> None:
    if isinstance(holder, dict):
        holder[random.choice((f"{key}x", "", "\ud800", "__class__"))] = holder.pop(key)
    else:
        holder.insert(0, holder[key])


def _elsewhere(holder: Any, key: Any, random: Random, tree: Any) -> None:
    place = random.choice([place for place in _places(tree) if place])
    value = tree
    for step in place:
        value = value[step]
    holder[key] = json.loads(json.dumps(value))


_CHANGES = (
    ("replaced", _replaced),
    ("replaced", _replaced),
    ("removed", _removed),
    ("near", _near),
    ("renamed", _renamed),
    ("moved", _elsewhere),
)


def _places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values of a JSON tree."""
    steps = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at] + [place for key, value in steps for place in _places(value, (*at, key))]


def _dumped(tree: Any) -> bytes:
    # Integers of thousands of digits cannot be printed by Python's own writer either; none is drawn here.
    return json.dumps(tree, ensure_ascii=True, indent=1).encode()


def _with(data: bytes, entry: bytes) -> bytes:
    body = data.rstrip()
    return body[:-1] + (b"," if body[:-1].rstrip()[-1:] not in b"{[" else b"") + entry + b"}"


def _safetensors(text: bytes, rest: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


_HOSTILE = {"nan": math.nan, "inf": math.inf, "1e30": 1e30, "1e-30": 1e-30, "0": 0.0, "-1e4": -1e4, "1e-42": 1e-42}
_ENCODED: dict[str, dict[str, bytes]] = {
    "F32": {name: struct.pack("<f", number) for name, number in _HOSTILE.items()},
    "F64": {name: struct.pack("<d", number) for name, number in (_HOSTILE | {"1e300": 1e300}).items()},
    "BF16": {"nan": b"\xc0\x7f", "inf": b"\x80\x7f", "1e30": b"\x4a\x71", "0": b"\0\0", "max": b"\x7f\x7f"},
}
"""By type, what a hostile number looks like on disk."""
_FRONTS = tuple(b"---\n" + front + b"\n---\n" for front in (
    b"a: [", b"- a\n- b", b"x", b"", b"a: &a [*a]", b"!!python/object/apply:os.system ['touch /tmp/headfold-owned']", b"? [a]\n: b",
    b"tags: {a: b}", b"license: 2026-01-01", b"base_model: [[[]]]\ntags: 3", b"\xff\xfe", b"x: " + b"[" * 3000,
    b"language: no\nmodel-index: x", b"\ttab: 1",
))  # fmt: skip
"""Metadata of a model card that is none, or another than it should be."""
