"""The house rule: a file imports only from layers below its own, or beside it without a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import ds_gpt2

PACKAGE = Path(ds_gpt2.__file__).parent
LAYERS = [
    {
        "errors",
        "config",
        "deepspeed_file",
        "csv_files",
        "schedule",
        "state",
        "batch",
        "stop",
        "outcome",
        "restarts",
        "watchdog",
        "machine",
        "metrics",
        "journal",
        "heartbeat",
        "supervised",
        "guard",
        "reference",
        "wording",
        "notes",
        "open_directory",
        "process_start",
        "safe_files",
        "safe_json",
        "run_address",
        "run_location",
        "paths",
        "strict_yaml",
        "launch_environment",
        "own_modules",
        "terminal",
        "model_names",
        "pace",
        "trackers",
        "tracker_process",
    },
    {"dist", "device", "compilation", "loss", "model", "products", "tokenizer", "data", "meter", "rng"},
    {
        "engine",
        "zero",
        "checkpoint",
        "monitor",
        "dashboard",
        "console",
        "generate",
        "hellaswag",
        "report",
        "status",
        "pretrained",
        "evaluation",
    },
    {"hooks", "loop"},
    {
        "assembly",
        "train",
        "launcher",
        "launch_ranks",
        "supervisor",
        "disk_watch",
        "preflight",
        "alerts",
        "planning",
        "doctor",
        "drill",
        "messages",
        "commands",
        "cli",
        "__main__",
    },
]


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    _module(path): ast.parse(path.read_text())
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.stem != "__init__"
}


def _imports(tree: ast.Module) -> set[str]:
    """Every dotted name that a file imports, in functions too; for ``from a import b`` both ``a`` and ``a.b``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _targets(name: str) -> set[str]:
    return {name.removeprefix("ds_gpt2.") for name in _imports(MODULES[name])} & (set(MODULES) - {name})


EDGES = {name: _targets(name) for name in MODULES}


def _layer(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if module.split(".")[0] in names)


def test_no_file_imports_from_a_layer_above_its_own() -> None:
    upward = [(name, target) for name, targets in EDGES.items() for target in targets if _layer(target) > _layer(name)]
    assert upward == []


def test_the_imports_form_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in EDGES[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
    assert len(done) == len(MODULES) > 30


def test_the_lowest_layer_is_pure_python() -> None:
    for name, tree in MODULES.items():
        if _layer(name) == 0:
            roots = {module.split(".")[0] for module in _imports(tree)}
            assert not roots & {"torch", "numpy", "deepspeed", "tiktoken"}, name
