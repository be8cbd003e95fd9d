"""A reader that does harm, for faults.hostile_input to count."""

import os
import time
from pathlib import Path

from faults.hostile_input import SIGN, Reader
from pipeline.core.errors import UserError


def harmful(folder: Path) -> Reader:
    """Each input gets the next of seven fates; the file HARMS, which outlives the process, says which is next."""
    harms = Path(os.environ["HARMS"])

    def read(content: bytes) -> None:
        if content == b"seed":
            return
        number = harms.stat().st_size if harms.exists() else 0
        with harms.open("ab") as file:
            file.write(b".")
        match number:
            case 1:
                raise UserError("refused")
            case 2:
                raise ValueError
            case 3:
                bytearray(b"x" * 200 * 2**20)
            case 4:
                (folder / SIGN).mkdir()
            case 5:
                time.sleep(60)
            case 6:
                os._exit(3)

    return Reader(b"seed", lambda random: b"mutated", read)
