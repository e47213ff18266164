"""Print which module of prunelib imports which, in layers: each only what stands below it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "prunelib"


def imported(source: str, modules: set[str], package: str = "prunelib") -> set[str]:
    """The modules of the package that a source imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    own = {name.removeprefix(f"{package}.").split(".")[0] for name in names if "." in name}
    return own & modules


def graph(folder: Path = PACKAGE) -> dict[str, set[str]]:
    """Module -> the modules beside it that it imports."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    modules = set(sources) - {"__init__"}
    return {
        name: imported(source, modules, folder.name) - {name} for name, source in sources.items()
    }


def layers(graph: dict[str, set[str]]) -> list[list[str]]:
    """The modules, lowest first. Raises graphlib.CycleError, which names a circle of imports."""
    order, found = TopologicalSorter(graph), []
    order.prepare()
    while order.is_active():
        found.append(sorted(order.get_ready()))
        order.done(*found[-1])
    return found


if __name__ == "__main__":
    of = graph()
    for layer in reversed(layers(of)):
        for name in layer:
            print(f"{name:<14}{', '.join(sorted(of[name]))}")
        print()
