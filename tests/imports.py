"""The local modules that a stage imports, directly or not, read off the source: imports inside functions count too."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def local_imports(path: Path) -> set[Path]:
    """Paths, relative to the checkout, of `path` and of every module of `pipeline` that it reaches."""
    reached: set[Path] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current in reached:
            continue
        reached.add(current)
        for node in ast.walk(ast.parse((ROOT / current).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            candidates = (Path(*name.split(".")).with_suffix(".py") for name in names if name.startswith("pipeline"))
            waiting.extend(candidate for candidate in candidates if (ROOT / candidate).is_file())
    return reached
