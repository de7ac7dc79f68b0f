"""Measures one thing against a reference, in one interleaved run: `python tools/benchmark.py NAME [flags]`.

Each NAME is a file of tools/benchmarks/ with a function `main(arguments)`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Run the benchmark that the first argument names. Exits with 2 and one line for an unknown name."""
    folder = Path(__file__).parent / "benchmarks"
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    if not arguments or arguments[0] not in names:
        unknown = f"unknown benchmark {arguments[0]!r}; " if arguments and arguments[0] not in ("-h", "--help") else ""
        print(f"benchmark: {unknown}there are: {', '.join(names)}", file=sys.stderr)
        sys.exit(0 if arguments and not unknown else 2)
    importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
