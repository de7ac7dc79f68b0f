"""Real English that is on every machine with Python: no network, no download, nothing to ship.

Two sources: CPython's language reference (`pydoc_data.topics`) and the docstrings of the standard library. Source files
are only parsed, never executed. The text, about 2 MB, differs between versions of Python, and so do the token cache and the
fingerprint of a run.
"""

import ast
import hashlib
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from recipes.data.cache import CacheEntry, content_hash
from recipes.data.text_sources import SPLITS

# Tests hold data rather than prose; installed packages and build settings differ from machine to machine.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
UNDERLINE = re.compile(r"\s*([^\w\s])\1{2,}\s*")  # the ===== below a heading
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def load_embedded(cache: Path) -> dict[str, list[str]]:
    """Return the rows (one paragraph each, on one line) of `train`, `validation` and `test`: about 90, 5 and 5 %.

    The cache keeps them for each build of Python, as parsing its library takes seconds.

    A whole file or topic goes to one split, chosen by a hash of its name. A paragraph is kept the first time it occurs
    and dropped afterwards, because topics contain one another and docstrings are copied between modules: without
    that the same text would be trained on and tested on.

    Raises FileNotFoundError if this Python has no standard library in source form.
    """
    entry = CacheEntry(cache / "embedded" / content_hash(sys.version, sysconfig.get_path("stdlib")))
    if entry.read() is None:
        rows = _parse()
        entry.write({split: "\n".join(rows[split]).encode("utf-8", "surrogatepass") for split in SPLITS})
    texts = {split: (entry.folder / split).read_bytes().decode("utf-8", "surrogatepass") for split in SPLITS}
    return {split: text.split("\n") for split, text in texts.items()}


def _parse() -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for name, text in _documents():
        for row in _paragraphs(text):
            if row not in seen:
                seen.add(row)
                rows[split_of(name)].append(row)
    return rows


def split_of(name: str) -> str:
    """Split of a document: a function of its name alone, so a new file in the next Python moves no other."""
    twentieth = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20
    return {0: "validation", 1: "test"}.get(twentieth, "train")


def _documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every topic and every source file, in the order of their names."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_source_files(library))
    if not paths:
        raise FileNotFoundError(f"this Python has no standard library sources in {library}; give text with --data_dir instead")
    for path in paths:
        yield path.relative_to(library).as_posix(), "\n\n".join(_docstrings(path))


def _source_files(library: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a source file; nothing if it cannot be read or is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in old modules
            module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    pending: list[ast.AST] = [module]
    while pending:
        node = pending.pop()
        if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield docstring
        # Only statements contain definitions; leaving expressions out makes this several times faster than ast.walk.
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler)]
        pending.extend(reversed(children))


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of `text`, each joined to one line; rules and paragraphs without a letter are dropped."""
    for block in BLANK_LINES.split(text):
        lines = [line for line in block.split("\n") if not UNDERLINE.fullmatch(line)]
        row = " ".join(" ".join(lines).split())
        if any(map(str.isalpha, row)):
            yield row
