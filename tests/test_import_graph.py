"""Which room imports which: arrows run down only, and nothing runs in a circle.

The imports are read from the source, those inside functions too; what stands under
``if TYPE_CHECKING`` is never run. ``import bigkernel`` is the front door, a room of its own: it
hands out names of the rooms above by a string, when they are asked for.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bigkernel"

# From the roof to the ground. A module may import from rooms below its own and from its own.
ROOMS: list[tuple[str, ...]] = [
    ("bigkernel.__main__",),
    ("bigkernel.cli",),
    ("bigkernel.bench",),
    ("bigkernel.recipes",),
    ("bigkernel",),
    ("bigkernel.trainer", "bigkernel.hub"),
    (
        "bigkernel.integrations",
        "bigkernel.optim",
        "bigkernel.transforms",
        "bigkernel.data",
        "bigkernel.utilization",
    ),
    ("bigkernel.ops", "bigkernel.reference"),
    ("bigkernel.registry", "bigkernel.backend", "bigkernel.tuning"),
    (
        "bigkernel._library",
        "bigkernel._native",
        "bigkernel._eager",
        "bigkernel.documents",
        "bigkernel.errors",
        "bigkernel.expect",
        "bigkernel.precision",
        "bigkernel.random",
    ),
    # The standard library alone, and no tensor: files, signals, memory, words.
    (
        "bigkernel._command",
        "bigkernel.checkpoint",
        "bigkernel.environment",
        "bigkernel.escape",
        "bigkernel.extras",
        "bigkernel.files",
        "bigkernel.heap",
        "bigkernel.interrupts",
        "bigkernel.measure",
        "bigkernel.run_lock",
    ),
]
# Beside the others: it may look into any room, and of the rooms only bench looks into it.
BESIDE = "bigkernel.testing"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> int | None:
    """Its floor, 0 for the roof; None for what stands beside them."""
    if module == BESIDE or module.startswith(f"{BESIDE}."):
        return None
    for floor, room in enumerate(ROOMS):
        for name in room:
            if module == name or (name != "bigkernel" and module.startswith(f"{name}.")):
                return floor
    raise AssertionError(f"{module} belongs to no room: say in {__file__} which one is its own")


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield other
                yield from run_time_nodes(other)
        else:
            yield node
            yield from run_time_nodes(node)


def imports(module: str, path: Path) -> set[str]:
    """The modules of the package that a module imports: each by its own name."""
    found = set()
    for node in run_time_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            base = node.module or ""
            names = []
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.append(full if full in MODULES else base)
        else:
            continue
        found |= {name for name in names if name in MODULES}
    return found - {module}


GRAPH = {module: imports(module, path) for module, path in MODULES.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == module:
                    break
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_arrows_run_down(module):
    floor = room_of(module)
    for other in GRAPH[module]:
        below = room_of(other)
        if floor is None:
            continue
        if below is None:
            assert module.startswith("bigkernel.bench"), f"{module} imports {other}"
        else:
            assert below >= floor, f"{module} imports {other}, which stands above it"


def test_nothing_runs_in_a_circle():
    assert circles(GRAPH) == []


def test_a_circle_and_an_arrow_upwards_are_found(tmp_path):
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    code = (
        "import os\ndef f():\n    from bigkernel.cli import app\n    import bigkernel.bench.case\n"
    )
    code += "if TYPE_CHECKING:\n    from bigkernel import trainer\n"
    (tmp_path / "x.py").write_text(code)
    found = imports("bigkernel.ops.x", tmp_path / "x.py")
    assert found == {"bigkernel.cli.app", "bigkernel.bench.case"}
    assert all(room_of(other) < room_of("bigkernel.ops.x") for other in found)


def test_the_ground_floor_needs_the_standard_library_alone():
    for module in ROOMS[-1]:
        for node in run_time_nodes(ast.parse(MODULES[module].read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"torch", "numpy"}, module
