"""What a stranger's file or request may hold, by what it looks like: damaged, malformed, malicious."""

import io
import struct
import zipfile
import zlib
from typing import Any

import numpy as np

from pipeline.serving.server import LIMIT

SIGN = "foreign-code-ran"  # the folder that code in it would make, in the working directory


def npy(dtype: Any = "|u1", shape: Any = (20, 8, 8, 1), data: bytes = b"", header: str = "") -> bytes:
    """An .npy file with this header, true or not."""
    text = (header or repr({"descr": dtype, "fortran_order": False, "shape": shape})).encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def npz(arrays: dict[str, np.ndarray], **replaced: bytes) -> bytes:
    """An .npz archive of arrays, of which .npy files replace some."""
    entries = {name: npy(array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()} | replaced
    with zipfile.ZipFile(stream := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return stream.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes], kind: tuple[int, int] = (8, 0)) -> bytes:
    """A PNG file that says it has these sides, bits and kind of colours, with right checksums."""
    chunks = ((b"IHDR", struct.pack(">II5B", width, height, *kind, 0, 0, 0)), *chunks)
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


IDAT, IEND = (b"IDAT", zlib.compress(bytes(29 * 28))), (b"IEND", b"")
PICKLE = f"cposix\nmkdir\n(S'{SIGN}'\ntR.".encode()
CODE = f"!!python/object/apply:os.mkdir ['{SIGN}']\n".encode()
POSTSCRIPT = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n({SIGN}) (w) file closefile showpage\n".encode()
LAUGHS = b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (n + 1, n + 1, b", ".join([b"*a%d" % n] * 9)) for n in range(20))
MERGES = LAUGHS.replace(b"[x]", b"{x: 1}").replace(b"[", b"{<<: [").replace(b"]", b"]}")

# To be refused, by the readers of what it looks like.
YAML = (
    *(LAUGHS, MERGES, b"kd: &a [*a]\n", b"x: " + CODE, CODE, b"\0", b"%YAML 9.9\n---\n", "x: \u2028\x85\ufeff\n".encode()),
    *(b"x: " + b"[" * 5000, b"x: " + b"[" * 100_000, b"x: " + b"{a: " * 5000, b"x: " + b"9" * 5000, b"x: 0x" + b"f" * 50_000),
    *(b"x: " + b"1:" * 20_000 + b"1\n", b"x: 2001-99-99\n", b"x: !!binary '???'\n", b"x: !!set {? [a]}\n", b"? {a: b}\n: c\n"),
    *(b"x: |\n " + b"y" * 2_000_000, b"x: " + b"y" * 90_000, b"- a\n" * 200_000, b"- 1\n- 2", b"--- a\n--- b\n", b"\xff\xfe"),
)
PIXELS = bytes([7]) * 1280  # 20 images of 8x8
SIDES = (0, 1, 19, 21, -1, 2**20, 2**31, 2**40, 2**62, 10**30, True, 1.5, None)
DTYPES = ("<i8", ">i8", "<f8", "<f2", "|b1", "<c16", "<U5", "<U0", "|V0", "|S3", "<M8[ns]", "O", "", None)
STRUCTURES = ([("a", "<i4"), ("b", "|O")], ("<i4", (2**40,)), [("a", "|V0")])
HUGE = ((2**40,), (2**62, 0, 8))
HEADERS = ("(" * 4000, "(" * 150 + "1" + ")" * 150, "{", "[]", "'" * 9, "{'shape': 1L}", "\0", "9" * 5000)
NO_ARRAY = (
    *(npy(shape=(side, 8, 8, 1), data=PIXELS) for side in SIDES),
    *(npy(header=header, data=PIXELS) for header in HEADERS),
    *(npy("|O", shape, PICKLE) for shape in ((20, 8, 8, 1), (1,), ())),
    *(npy(shape=shape) for shape in HUGE),
    *(npy(data=PIXELS[1:]), npy(data=PIXELS + b"\0"), npy(dtype="xx", data=PIXELS), npy(dtype=7, data=PIXELS)),
)
NO_IMAGES = (
    *(npy(dtype, data=PIXELS) for dtype in DTYPES + STRUCTURES),
    *(npy(dtype, shape) for dtype in ("<U0", "|V0") for shape in HUGE),
    *(npy(shape=(19, 8, 8, 1), data=PIXELS[64:]), npy("<U5", data=bytes(25_600))),
)
NPY = (*NO_ARRAY, *NO_IMAGES)
VALID_PNG = png(28, 28, IDAT, IEND)
WRONG_SIDES = ((50_000, 50_000), (10_000, 10_000), (28, 2**31), (2**32 - 1, 2**32 - 1), (0, 28), (8, 8))
PNG = (
    *(png(*sides, IDAT, IEND) for sides in WRONG_SIDES),
    *(b"GIF89a\x1c\0\x1c\0\0\0\0", POSTSCRIPT, png(28, 28, IEND), png(28, 28, (b"IDAT", b"x" * 100), IEND)),
    png(28, 28, (b"IDAT", IDAT[1][:-8]))[:-20],
)
BODIES = (
    *(b"", b'{"inputs": []}', b'{"inputs": [[[[NaN]]]]}', b'{"inputs": [' + b"[[[[[[0]]]]]]," * 250_000 + b"0]}"),
    *(b'{"inputs": [' + b"[]," * 1_000_000 + b"[]]}", b'{"instances": [' + b'{"":1},' * 500_000 + b"0]}", b"[" * 4_000_000),
    *(b'{"inputs": ["' + b"x" * 2_000_000 + b'"' + b',"a"' * 400_000 + b"]}", b'{"inputs": [' + b"1e9," * 1_000_000 + b"0]}"),
    *(b'{"dataframe_records": [' + b'"",' * 1_000_000 + b'""]}', b'{"inputs": [' + b"9" * 4_000_000 + b"]}", b" " * (LIMIT + 1)),
)
REQUESTS = (  # content type, line feed, body
    *(b"text/csv\na,b\n1,2", b"application/vnd.apache.parquet\nPAR1", b"\n", b"application/json; charset=x\n"),
    *(b"application/json\n" + body for body in BODIES),
)
DESCRIPTIONS = (  # of a checkpoint: of which part, what is other than its weights have it, or larger than any memory
    *(("arguments", {"width": 4096, "hidden": 65_536}), ("arguments", {"hidden": 10**12}), ("arguments", {"width": 10**30})),
    *(("arguments", {"name": "resnet18"}), ("dataset", {"image_shape": [60_000, 60_000, 1]}), ("dataset", {"std": 0})),
    *(("dataset", {"image_shape": [10**12, 8, 1]}), ("dataset", {"classes": ["x"] * 200_000})),
)
UNKNOWN_TYPE = b'\x35\0\0\0\0\0\0\0{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}abcd'
# Parts of JSON: instead of one in a valid file.
JSON = (
    *(b"null", b"true", b"-1", b"0", b"65536", b"2147483648", b"0.5", b"1e308", b"1e999", b"NaN", b"9" * 400, b"9" * 5000, b""),
    *(b'""', b'"' + b"x" * 10_000 + b'"', b'"../../../etc/passwd"', b'"\\u0000\\u001b[2J"', b'"F4"', b'"BF16"', b'"__class__"'),
    *(b"[]", b"{}", b"[{}]", b'{"": {}}', b'0, "extra": 0', b'0, "in_channels": 0', b"[" + b"[]," * 999 + b"0]"),
    *(b"[" * 50_000, b"[" * 50_000 + b"]" * 50_000),
)
# Pictures that may be accepted.
KINDS = (b"zTXt", b"iCCP", b"iTXt", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"eXIf")
CHUNKS = tuple(png(28, 28, (kind, b"a\0\0\1\0\0\0"), IDAT, IEND) for kind in KINDS)
# All of it: to a reader of anything else, of another kind.
FOREIGN = (*YAML, *JSON, *NPY, *PNG, *CHUNKS, b"\x93NUMPY\1\0", b"PK\5\6" + bytes(18), PICKLE)
