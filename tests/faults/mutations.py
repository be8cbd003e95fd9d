"""Valid input made hostile. Every function is decided by the `random.Random` that it is given.

Bytes are damaged blindly; zip archives, arrays, PNG, JSON and YAML are taken apart and put together wrong, so that what
parses well but lies is reached too.
"""

import ast
import copy
import functools
import json
import os
import pickle
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

INTEGERS = (0, 1, 2**7, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1)
NUMBERS = (None, True, -1, 0, 1, 65_536, 2**31, 2**64, 10**400, 0.5, 1e308, float("nan"), float("inf"))
TEXTS = ("", "x" * 10_000, "../../../etc/passwd", "\0\x1b[2J", "<deep>", "<long>", "F4", "BF16")
ODD = (*NUMBERS, *TEXTS, [], {}, [[]] * 1000, [{}], {"": {}})
KEYS = ("extra", "name", "in_channels", "__class__", "", "x" * 1000)
DESCRIPTORS = ["<i8", ">i8", "<f8", "<f2", "|b1", "<c16", "<U5", "<U0", "|V0", "|S3", "<M8[ns]", "O", "<u8", "xx"]
SIDES = (0, 1, -1, 2**20, 2**31, 2**40, 2**62, 10**30, True, 1.5, None)
BOMB = 3 * 2**30  # bytes of zeros that a few MB unpack to
MIB = 2**20


class Payload:
    """Unpickled, it makes the folder `path`: the sign that foreign code was run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def damage(content: bytes, random: Random) -> bytes:
    """Truncate, flip, overwrite, repeat, remove or insert, one to three times."""
    for _ in range(random.randint(1, 3)):
        at, size = random.randrange(len(content) + 1), random.choice((1, 4, 64, 4096))
        head, there, tail = content[:at], content[at : at + size], content[at + size :]
        width, order = random.choice((1, 2, 4, 8)), random.choice(("little", "big"))
        number = (random.choice(INTEGERS) % 256**width).to_bytes(width, order)  # a length or an offset, perhaps
        flipped = bytes(byte ^ (1 << random.randrange(8)) for byte in there[:4]) + there[4:]
        filled = random.choice((b"\0", b"\xff")) * len(there)
        changed = (flipped, random.randbytes(len(there)), filled, there * random.choice((0, 2, 100)))
        moved = content[random.randrange(len(content) + 1) :][:at] + content
        content = random.choice((head, *(head + part + tail for part in changed), head + number + content[at + width :], moved))
    return content


def foreign(random: Random, sign: Path) -> bytes:
    """A file of another kind altogether."""
    payload, postscript = Payload(sign), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n"
    files = (
        *(b"", b"\0" * 100_000, random.randbytes(1000), b"\x93NUMPY\x01\0", b"PK\x05\x06" + b"\0" * 18),
        *(pickle.dumps(payload), pickle.dumps(payload, protocol=0), array_file("|u1", (2**40,), b"")),
        archive([("a.npy", array_file("|O", (1,), pickle.dumps([payload])))]),
        postscript + b"(%s) (w) file closefile showpage\n" % str(sign).encode(),
        yaml_text({}, random, sign),
    )
    return random.choice(files)


def json_text(value: Any, random: Random) -> bytes:
    """A JSON value with some of its parts odd, left out or added."""
    value = json.loads(json.dumps(value))
    for _ in range(random.randint(1, 3)):
        value = _change(value, random)
    text = json.dumps(value)
    return text.replace('"<deep>"', "[" * 50_000 + "]" * 50_000).replace('"<long>"', "9" * 5000).encode()


def yaml_text(value: Any, random: Random, sign: Path) -> bytes:
    """A YAML value likewise, with what YAML can do beyond JSON."""
    text = yaml.safe_dump(_change(json.loads(json.dumps(value)), random), allow_unicode=True).encode()
    aliases = [b", ".join([b"*a%d" % n] * 9) for n in range(20)]
    laughs = b"".join(b"a%d: &a%d [%s]\n" % (n + 1, n + 1, nine) for n, nine in enumerate(aliases))
    merges = b"".join(b"a%d: &a%d {<<: [%s]}\n" % (n + 1, n + 1, nine) for n, nine in enumerate(aliases))
    code = b"!!python/object/apply:os.mkdir ['%s']\n" % str(sign).encode()
    extras = (
        *(b"a0: &a0 [x]\n" + laughs, b"a0: &a0 {x: 1}\n" + merges, b"kd: &a [*a]\n", b"x: " + code, code),
        *(b"x: " + b"[" * random.choice((100, 100_000)), b"x: " + b"{a: " * 5000, b"x: " + b"9" * 5000 + b"\n"),
        *(b"x: 0x" + b"f" * 50_000 + b"\n", b"x: " + b"1:" * 20_000 + b"1\n", b"x: 2001-99-99\n", b"x: !!binary '???'\n"),
        *(b"x: !!set {? [a]}\n", b"? {a: b}\n: c\n", b"\0", b"\xff\xfe", b"x: |\n " + b"y" * 2_000_000 + b"\n"),
        *(b"- a\n" * 200_000, b"--- a\n--- b\n", b"%YAML 9.9\n---\n", "x: \u2028\x85\ufeff\n".encode()),
    )
    return random.choice((text, text + random.choice(extras), random.choice(extras) + text, random.choice(extras)))


def safetensors_file(content: bytes, random: Random, described: str) -> bytes:
    """A safetensors file with its header changed, or the JSON that its metadata holds under `described`."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    inside = json.loads(header.get("__metadata__", {}).get(described, "{}"))
    if random.random() < 0.7:
        header["__metadata__"] = {described: json_text(inside, random).decode()}
        text = json.dumps(header).encode()
    else:
        text = json_text(header, random)
    length = len(text) if random.random() < 0.9 else random.choice(INTEGERS)
    return length.to_bytes(8, "little") + text + data[: random.choice((None, None, -1, 0))]


def array_file(descr: Any, shape: Any, data: bytes, header: str | None = None, version: int = 1) -> bytes:
    """An .npy file with this header, true or not."""
    text = (header or repr({"descr": descr, "fortran_order": False, "shape": shape})).encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def odd_array(content: bytes, random: Random, sign: Path) -> bytes:
    """An .npy file (version 1) with another header, other data or both."""
    size = struct.unpack("<H", content[8:10])[0]
    header, data = ast.literal_eval(content[10 : 10 + size].decode()), content[10 + size :]
    descr, shape = header["descr"], header["shape"]
    at, part = random.randrange(len(shape)), data[: random.randrange(len(data))]
    deep = "(" * random.choice((50, 150, 4000)) + "1" + ")" * 4000
    headers = (deep, "{", "[]", "{'descr': " + deep + "}", "'" * 9, "{'shape': 1L}", "\0", "9" * 5000)
    structured = [("a", "<i4"), ("b", "|O")], ("<i4", (2**40,)), [("a", "|V0")]
    files = (
        array_file(descr, (*shape[:at], random.choice(SIDES), *shape[at + 1 :]), data),
        array_file(random.choice((*DESCRIPTORS, *structured, "", 7, None)), shape, data),
        *(array_file(descr, shape, part), array_file(descr, shape, data + data)),
        array_file(descr, shape, data, header=random.choice(headers)),
        array_file("|O", random.choice((shape, (1,), ())), pickle.dumps([Payload(sign)])),
        array_file(random.choice(("<U0", "|V0", "|u1")), (random.choice((2**40, 2**62)), 0, 8), b""),
        array_file(descr, shape, data, version=random.choice((2, 3))),
    )
    return random.choice(files)


def odd_npz(arrays: dict[str, bytes], random: Random, sign: Path) -> bytes:
    """An archive of .npy files, by name, some of them odd, unpacking to gigabytes, misnamed or wrongly declared."""
    entries = list(arrays.items())
    at = random.randrange(len(entries))
    name, content = entries[at]
    odd = name, odd_array(content, random, sign)
    added = random.choice(("class_names.npy", "../x.npy", name)), foreign(random, sign)
    changes = ([odd], [odd], [(f"../../{name}", content)], [(name, content), odd], [], [(name, content), added])
    entries[at : at + 1] = random.choice(changes)
    return archive(entries, random, bomb=random.choice(entries)[0] if random.random() < 0.1 else None)


def archive(entries: list[tuple[str, bytes]], random: Random | None = None, bomb: str | None = None) -> bytes:
    """A zip archive. With `random` it may lie about its entries; the entry `bomb` unpacks to gigabytes."""
    body, directory = b"", b""
    for name, content in entries:
        method, flags, size = 8, 0, len(content)
        packed = _deflated(content)
        if name == bomb:
            start = array_file("|u1", (BOMB // 784, 28, 28), b"")
            size, packed = len(start) + BOMB // 784 * 784, _deflated(start, zlib.Z_FULL_FLUSH) + _zeros() * (BOMB // MIB - 1)
        if random and random.random() < 0.1:
            method = random.choice((0, 1, 8, 9, 12, 14, 93, 99))
        if random and random.random() < 0.1:
            flags = random.choice((1, 1 << 5, 1 << 6, 1 << 11))
        if random and random.random() < 0.1:
            size = random.choice(INTEGERS) % 2**32
        same = struct.pack("<HHHHHIIIHH", 20, flags, method, 0, 33, zlib.crc32(content), len(packed), size, len(name), 0)
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + same + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name.encode()
        body += b"PK\x03\x04" + same + name.encode() + packed
    count = len(entries)
    return body + directory + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(body), 0)


def odd_png(content: bytes, random: Random) -> bytes:
    """A PNG file with a chunk changed, left out, doubled or added; the checksums fit."""
    chunks, at = [], 8
    while at < len(content):
        size = struct.unpack(">I", content[at : at + 4])[0]
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += size + 12
    at = random.randrange(len(chunks))
    kind, data = chunks[at]
    kinds, zeros = [b"IDAT", b"zTXt", b"iCCP", b"iTXt", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf"], _zeros() * 1500
    text = random.choice((b"a\0\0\x78\x9c" + zeros, b"a\0\1\0\0\0\x78\x9c" + zeros, b"", data))
    sides = struct.pack(">II", *(random.choice((0, 1, 7, 8, 28, 2**14, 2**16, 2**31 - 1, 2**32 - 1)) for _ in range(2)))
    added = (kind, data), (random.choice(kinds), text)
    chunks[at : at + 1] = random.choice(
        ([(kind, damage(data, random))], [(kind, sides + data[8:])], [], [(kind, data)] * 2, added)
    )
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return content[:8] + b"".join(packed)


def _change(value: Any, random: Random) -> Any:
    """`value` with one part of it odd, gone, new or doubled."""
    places, odd = list(_places(value)), copy.deepcopy(random.choice(ODD))
    if not places or random.random() < 0.03:
        return odd
    container, key = random.choice(places)
    match random.randrange(6):
        case 0 | 1 | 2:
            container[key] = odd
        case 3:
            del container[key]
        case 4:
            donor, name = random.choice(places)
            container[key] = copy.deepcopy(donor[name])
        case _ if isinstance(container, dict):
            container[random.choice(KEYS)] = odd
        case _:
            container.insert(key, odd)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in `value`."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _deflated(content: bytes, flush: int = zlib.Z_FINISH) -> bytes:
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(content) + packer.flush(flush)


@functools.cache
def _zeros() -> bytes:
    """A MiB of zeros, deflated so that it can be repeated."""
    return _deflated(bytes(MIB), zlib.Z_FULL_FLUSH)
