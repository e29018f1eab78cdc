"""The house stands: imports go down the floors, files and functions stay small."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kvqtool"
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        *(
            "errors",
            "side",
            "adaptive",
            "words",
            "spec",
            "memory",
            "accounting",
            "page_memory",
            "layers",
            "config",
            "layertypes",
            "states",
        ),
        *(
            "architectures",
            "trunk",
            "headers",
            "weights",
            "parameters",
            "amounts",
            "scratch",
            "kernel_scratch",
        ),
        *("peaks", "shape", "sharding", "scheme", "load", "catalog", "questions", "assumptions"),
        *("explain", "plan", "files", "progress"),
    ),
    (
        "ranks",
        "bits",
        "outliers",
        "kmeans",
        "codebook",
        "compensation",
        "hadamard",
        "histogram",
        "quantiles",
        "codec",
        "tolerance",
        "mixed",
        "buffers",
        "packed",
        "slabs",
        "turning",
        "pages",
        "recover",
        "page_store",
        "page_body",
    ),
    (
        "container",
        "methods",
        "bundle_parts",
        "bundle",
        "cuda",
        "variant",
        "arguments",
        "fused",
        "code_tables",
        "packing_kernels",
        "packing",
        "appending",
        "reading",
        "ops",
        "matvec",
    ),
    (
        *("rope", "angles", "seam", "padding", "rows", "store", "decision", "shadow"),
        *("adaptive_store", "council", "stepwise", "read_path", "blockwise", "reader"),
        *("page_writer", "open_page", "paged"),
    ),
    (
        "identity",
        "spread",
        "models",
        "tables",
        "data",
        "attach",
        "masks",
        "attention",
        "layer",
        "adaptive_layer",
        "cache",
        "steady",
        "context_parallel",
        "shared_layer",
        "usage",
        "forward",
        "split",
        "probe",
        "queries",
        "capture",
        "live",
        "hub",
    ),
    (
        "ranges",
        "collect",
        "fit",
        "partial",
        "trials",
        "budget",
        "findings",
        "calibrate",
        "tally",
        "perplexity",
        "allocate",
        "search",
        "passkey",
        "choices",
        "sampling",
        "decode",
        "generation",
        "restore",
        "cachefile",
        "synthetic",
        "measure",
        "doctor",
    ),
    ("cli", "__main__", "__init__"),
)
# What a floor may import from outside, beside the standard library and what the floors below may.
OUTSIDE: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"torch", "numpy"}),
    frozenset({"safetensors", "cupy"}),
    frozenset(),
    frozenset({"transformers", "datasets", "pyarrow", "huggingface_hub"}),
    frozenset(),
    frozenset({"typer", "rich", "matplotlib"}),
)
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 50, 6
FILES = sorted(PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def room(path: Path) -> str:
    """Return the name under which a file stands on a floor: kvqtool/cli/ppl.py is in `cli`."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def floor_of(name: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS) if name in rooms]
    assert len(found) == 1, f"kvqtool/{name} stands on {len(found)} floors; give it one in FLOORS"
    return found[0]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(tree: ast.AST, *, at_import: bool = False) -> Iterator[str]:
    """Yield the dotted names a tree imports; `at_import`: only those that importing it runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from _imported_from(node)
        elif not (at_import and (isinstance(node, Function) or is_typing_only(node))):
            yield from imports(node, at_import=at_import)


def _imported_from(node: ast.ImportFrom) -> Iterator[str]:
    """Yield the modules of a from-import: `from kvqtool.cli import ppl` imports kvqtool.cli.ppl."""
    base = node.module or ""
    folder = PACKAGE.parent.joinpath(*base.split("."))
    modules = {a.name for a in node.names if base and (folder / f"{a.name}.py").exists()}
    yield from (f"{base}.{name}" for name in sorted(modules))
    if len(modules) < len(node.names):
        yield base


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, Function))


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=named)
class TestFile:
    def test_imports_of_the_package_go_down(self, path: Path) -> None:
        own = floor_of(room(path))
        inner = {name.split(".")[1] for name in imports(parse(path)) if name.startswith("kvqtool.")}
        upward = sorted(name for name in inner if floor_of(name) > own)
        assert not upward, f"floor {own} imports {upward} from above; move the function"

    def test_imports_from_outside_belong_to_its_floor(self, path: Path) -> None:
        allowed = frozenset().union(*OUTSIDE[: floor_of(room(path)) + 1])
        known = allowed | sys.stdlib_module_names | {"kvqtool"}
        foreign = sorted({name.split(".")[0] for name in imports(parse(path))} - known)
        assert not foreign, f"{foreign} is not for floor {floor_of(room(path))}"

    def test_file_is_short(self, path: Path) -> None:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES

    def test_functions_are_short(self, path: Path) -> None:
        # Options of a Typer command are parameters, a few lines each: there the body counts alone.
        first = {f: f.body[0].lineno if room(path) == "cli" else f.lineno for f in functions(path)}
        lengths = {f.name: (f.end_lineno or 0) - line + 1 for f, line in first.items()}
        long = {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
        assert not long, f"split {long}"

    def test_functions_have_few_parameters(self, path: Path) -> None:
        if room(path) == "cli":
            return  # an option of a Typer command is a parameter, and a command has many
        many = {f.name: n for f in functions(path) if (n := _parameters(f)) > MAX_PARAMETERS}
        assert not many, f"make a dataclass of the parameters of {many}"


def _parameters(function: Function) -> int:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_every_room_of_the_table_exists() -> None:
    rooms = {room(path) for path in FILES}
    assert rooms == {name for floor in FLOORS for name in floor}


def test_methods_know_only_floor_one_and_their_base() -> None:
    for path in sorted((PACKAGE / "methods").glob("*.py")):
        if path.name == "__init__.py":
            continue
        inner = {name for name in imports(parse(path)) if name.startswith("kvqtool.")}
        siblings = {name for name in inner if name.startswith("kvqtool.methods.")}
        assert siblings <= {"kvqtool.methods.base"}, path.name
        assert all(floor_of(name.split(".")[1]) <= 1 for name in inner - siblings), path.name


def test_modules_import_each_other_in_one_direction() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        relative = path.relative_to(PACKAGE.parent).with_suffix("")
        name = ".".join(relative.parts).removesuffix(".__init__")
        needs = set(imports(parse(path), at_import=True)) - {name}
        graph[name] = {needed for needed in needs if needed.startswith("kvqtool.")}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_only_the_command_line_prints_or_exits() -> None:
    banned = {"print", "exit", "quit", "sys.exit", "input", "os._exit"}
    for path in FILES:
        if room(path) in ("cli", "__main__"):
            continue
        calls = {ast.unparse(n.func) for n in ast.walk(parse(path)) if isinstance(n, ast.Call)}
        assert not calls & banned, f"{named(path)} calls {calls & banned}"
