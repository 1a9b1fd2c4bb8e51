"""The order of rooms: who may import whom, told once and held against all imports."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = "m2mkd_jax"

# From the top down. A room (a folder, or a module that lies directly in the package; PACKAGE itself
# is the package's own __init__.py) imports from lower floors only.
FLOORS = (
    ("main", "convert", "predict", "export", "push", "__main__"),
    ("report",),
    ("command_line",),
    (PACKAGE,),
    ("inference", "jobs"),
    ("phases",),
    ("detection",),
    ("conversion",),
    ("config",),
    ("checkpoint", "evaluate"),
    ("train", "models"),
    ("losses", "data", "parallel"),
    ("files",),
    ("arguments",),
    ("errors", "tree_paths", "interruption", "streams"),
)
# What config may import of models: modules without jax.
CONFIG_MAY_IMPORT = {
    f"{PACKAGE}.models.{name}" for name in ("vit_spec", "variants", "moe.spec", "nac.spec")
}
# Boxes of the diagram in docs/design.md that stand for several modules; every folder has its own.
BOXES = {
    "commands": ("main", "convert", "predict", "export", "push", "__main__", "command_line"),
    "library": (PACKAGE, "inference"),
}
NOT_DRAWN = ("arguments", "errors", "tree_paths", "interruption", "streams")
MOST_MODULES_ON_TOP, LONGEST_FUNCTION = 9, 60
CODE = (PACKAGE, "benchmarks", "configs", "examples")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if (name := inner if inner in known else node.module) in known:
                    yield name


def import_graph() -> dict[str, set[str]]:
    modules = package_modules()
    return {
        name: set(imported(ast.parse(path.read_text()), set(modules))) - {name}
        for name, path in modules.items()
    }


GRAPH = import_graph()


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def room_imports() -> dict[tuple[str, str], list[str]]:
    """The modules that import, by (room, room that it imports from)."""
    found = defaultdict(list)
    for module, targets in GRAPH.items():
        for target in targets:
            if room(module) != room(target):
                found[room(module), room(target)].append(f"{module} imports {target}")
    return found


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; [] where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name not in done:
            for target in sorted(graph[name]):
                if circle := visit(target, [*path, name]):
                    return circle
            done.add(name)
        return []

    return next((circle for name in graph if (circle := visit(name, []))), [])


def drawn_arrows(text: str) -> set[tuple[str, str]]:
    """The arrows of the flowchart in a Markdown text: `a --> b & c`."""
    diagram = re.search(r"```mermaid\nflowchart TB\n(.*?)```", text, re.DOTALL)
    assert diagram, "no flowchart"
    arrows = set()
    for line in diagram[1].splitlines():
        if "-->" in line:
            source, targets = line.split("-->")
            arrows |= {(source.strip(), target.strip()) for target in targets.split("&")}
    return arrows


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function; 0 for a table of defaults: nothing but `return` of a dict or call."""
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    if len(body) == 1 and isinstance(body[0], ast.Return):
        value = body[0].value
        if isinstance(value, ast.Dict) or (
            isinstance(value, ast.Call) and not value.args and value.keywords
        ):
            return 0
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def test_every_room_has_a_floor():
    floors = [name for floor in FLOORS for name in floor]
    assert len(set(floors)) == len(floors)
    assert {room(module) for module in GRAPH} <= set(floors)


def test_no_import_back_up_or_along_a_floor():
    level = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    wrong = [
        line
        for (source, target), lines in room_imports().items()
        if level[source] >= level[target]
        for line in lines
    ]
    assert not wrong


def test_config_imports_only_what_is_free_of_jax():
    of_models = {t for m in GRAPH if room(m) == "config" for t in GRAPH[m] if room(t) == "models"}
    assert of_models <= CONFIG_MAY_IMPORT


def test_no_circle_of_modules():
    assert find_circle(GRAPH) == []
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_few_modules_lie_on_top():
    on_top = sorted(path.name for path in (ROOT / PACKAGE).glob("*.py"))
    assert len(on_top) <= MOST_MODULES_ON_TOP, on_top


def test_the_picture_of_the_house_shows_the_imports():
    box = {name: title for title, names in BOXES.items() for name in names}
    real = {
        (box.get(source, source), box.get(target, target))
        for source, target in room_imports()
        if target not in NOT_DRAWN and source not in NOT_DRAWN
    }
    real = {(source, target) for source, target in real if source != target}
    drawn = drawn_arrows((ROOT / "docs" / "design.md").read_text())
    assert drawn - real == set(), "drawn in docs/design.md, but not imported"
    assert real - drawn == set(), "imported, but not drawn in docs/design.md"


@pytest.mark.parametrize("module", ["config", *(m for m in GRAPH if room(m) == "config")])
def test_config_loads_no_jax(module):
    name = module if module.startswith(PACKAGE) else f"{PACKAGE}.{module}"
    code = f"import sys, {name}; print(*[m for m in ('jax', 'flax', 'optax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_functions_are_short():
    long = []
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if (lines := body_lines(node)) > LONGEST_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long
