"""Import rules: the pure rooms know only ``core``, executor and simulator do not know each other, nobody imports ``serve``.

    python -m tools.imports

Imports inside functions and under TYPE_CHECKING count as well. At the end the pure rooms are really imported, to see that torch stays out.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "presage"
PURE_LIBRARIES = frozenset({"numpy", "numba", "msgspec", "pydantic"})
PURE = {
    "core": frozenset[str](),
    "schedule": frozenset({"core"}),
    "cache": frozenset({"core"}),
    "draft.length": frozenset({"core", "verify"}),
    "program": frozenset({"core"}),
    "cluster.routers": frozenset({"core"}),
    "plan": frozenset({"core"}),
}
"""Room -> other rooms it may import."""
TORCHLESS = frozenset({"torch", "triton", "transformers"})
EXTRA = {"plan": frozenset({"scipy"}), "core": frozenset({"numpy"})}
NEVER = {"execute": ("simulate",), "simulate": ("execute", "layers", "models", "kernels")}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name below ``presage``, path) of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import statement."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # "from presage import serve" names the room in the alias, so both parts are joined there.
            yield from ((node.lineno, f"presage.{alias.name}") for alias in node.names) if base == "presage" else [(node.lineno, base)]


def inside(name: str, room: str) -> bool:
    """Whether a dotted name lies in a room."""
    return name == room or name.startswith(room + ".")


def complaint(module: str, name: str) -> str | None:
    """Why ``module`` may not import ``name``, or None."""
    if name.startswith("."):
        return "relative import"
    own = name.removeprefix("presage.") if name.startswith("presage.") else None
    if own is not None and inside(own, "serve") and not inside(module, "serve"):
        return "nothing imports serve"
    for room, banned in NEVER.items():
        if inside(module, room) and any(inside(name, f"presage.{b}") for b in banned):
            return f"{room} never imports {name}"
    if inside(module, "simulate") and name.partition(".")[0] in TORCHLESS:
        return "simulate runs without torch"
    for room, rooms in PURE.items():
        if inside(module, room):
            return _impure(room, rooms, own, name)
    return None


def _impure(room: str, rooms: frozenset[str], own: str | None, name: str) -> str | None:
    if own is not None:
        allowed = own.startswith("__") or any(inside(own, r) for r in (*rooms, room))
        return None if allowed else f"{room} imports only {', '.join(sorted({*rooms, room}))}"
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top in PURE_LIBRARIES | EXTRA.get(room, frozenset()):
        return None
    return f"{room} may not import {top}"


def static() -> list[str]:
    """Findings of the source itself."""
    found = []
    for module, path in modules():
        for line, name in imported(path):
            if why := complaint(module, name):
                found.append(f"{path.relative_to(ROOT)}:{line}: {why}")
    return found


def runtime() -> list[str]:
    """Import each pure room in a process of its own; findings name what it drags in."""
    rooms = [*PURE, "simulate"]
    names = {room: [f"presage.{m}" for m, _ in modules() if inside(m, room)] for room in rooms}
    found = []
    for room, wanted in names.items():
        if not wanted:
            continue
        code = f"import importlib, sys\nfor m in {wanted!r}: importlib.import_module(m)\nsys.exit('torch' if 'torch' in sys.modules else 0)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "src", check=False)
        if done.stderr.strip():
            found.append(f"importing presage.{room} loads or raises: {done.stderr.strip().splitlines()[-1]}")
    return found


def main() -> int:
    """Print the findings."""
    found = static() + runtime()
    print("\n".join(found) or f"imports: {sum(1 for _ in modules())} modules keep the rules")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
