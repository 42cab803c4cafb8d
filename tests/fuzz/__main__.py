"""python -m tests.fuzz [--structured N] [--bytes N] [READER ...]: run every reader and count its branches."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.driver import fuzz, table
from tests.fuzz.readers import READERS, build


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--structured", type=int, default=500)
    parser.add_argument("--bytes", type=int, default=150)
    parser.add_argument("readers", nargs="*", metavar="READER", default=[reader.name for reader in READERS])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder))
        chosen = [reader for reader in READERS if reader.name in options.readers]
        results = [fuzz(reader, built, options.structured, options.bytes, branches=True) for reader in chosen]
    print(table(results))
    for result in results:
        for line in result.failures:
            print(f"{result.name}: {line}")
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
