"""Size table per folder, and the caps: files of 600 lines, functions of 80, nine functions in ten of the package within 35.

    python -m tools.sizes

A function's length is its lines from ``def`` to its last line, docstring included. Exits with 1 over a cap.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCANNED = ("src", "tests", "benchmarks", "tools", "examples", "papers")
MAX_FILE, MAX_FUNCTION, MAX_P90 = 600, 80, 35


@dataclass(slots=True)
class Folder:
    """Sizes of one folder: files, lines, and the length of each function."""

    files: int = 0
    lines: int = 0
    functions: list[int] = field(default_factory=list)

    def row(self, name: str) -> str:
        """One line of the table."""
        f = self.functions or [0]
        return f"{name:40} {self.files:5} {self.lines:7} {len(self.functions):6} {statistics.median(f):6.0f} {p90(f):5} {max(f):5}"


def p90(values: list[int]) -> int:
    """Smallest value that at least nine in ten do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-9 * len(ordered) // 10) - 1)]


def functions(tree: ast.AST) -> Iterator[tuple[str, int, int]]:
    """(name, line, length) of every function, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def scan(root: Path = ROOT) -> tuple[dict[str, Folder], list[str]]:
    """Folders by name, and the findings."""
    folders: dict[str, Folder] = defaultdict(Folder)
    found = []
    for path in sorted(p for top in SCANNED for p in (root / top).rglob("*.py")):
        text, where = path.read_text(encoding="utf-8"), path.relative_to(root)
        folder = folders[str(where.parent)]
        lines = text.count("\n")
        folder.files, folder.lines = folder.files + 1, folder.lines + lines
        if lines > MAX_FILE:
            found.append(f"{where}: {lines} lines, the cap is {MAX_FILE}")
        for name, line, length in functions(ast.parse(text)):
            folder.functions.append(length)
            if length > MAX_FUNCTION:
                found.append(f"{where}:{line}: {name} has {length} lines, the cap is {MAX_FUNCTION}")
    return folders, found


def main() -> int:
    """Print the table and the findings."""
    folders, found = scan()
    print(f"{'folder':40} {'files':>5} {'lines':>7} {'funcs':>6} {'median':>6} {'p90':>5} {'max':>5}")
    package = Folder()
    for name, folder in sorted(folders.items()):
        print(folder.row(name))
        if name.startswith("src"):
            package.files, package.lines = package.files + folder.files, package.lines + folder.lines
            package.functions += folder.functions
    print(package.row("all of src"))
    if p90(package.functions or [0]) > MAX_P90:
        found.append(f"src: nine functions in ten must have at most {MAX_P90} lines, they have {p90(package.functions)}")
    print("\n".join(found) or "sizes: within the caps")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
