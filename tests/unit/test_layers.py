"""The layers of docs/architecture.md, read off the import statements themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {"nbdserve": set[str](), "overlay": {"nbdserve"}, "recipes": {"nbdserve", "overlay"}}
FOLDERS = {
    "nbdserve": (
        "common",
        "protocol",
        "client",
        "backends",
        "transmission",
        "exports",
        "connection",
        "service",
        "channel",
        "qmp",
        "monitor",
        "cli",
    ),
    "overlay": (
        "channel",
        "formats",
        "backing",
        "fill",
        "mirror",
        "",
        "monitor",
        "inspect",
        "commit",
        "cli",
    ),
    "recipes": (
        "",
        "hosts",
        "connections",
        "certificates",
        "processes",
        "qemu",
        "plans",
        "discovery",
        "checks",
        "migrate",
        "channel",
        "running",
        "engines",
        "precopy",
        "fencing",
        "steps",
        "recovering",
        "commands",
        "demo",
        "cli",
    ),
}
"""Inside a package, from the lowest to the highest; "" are the modules that lie in no folder."""
MOST_MODULES = 12
IMPURE = {
    "asyncio",
    "fcntl",
    "io",
    "os",
    "pathlib",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "threading",
}


def imported_modules(source: Path) -> Iterator[str]:
    """Yield the dotted name of every module that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(source.read_text(), str(source))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: import by the full name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: str) -> list[Path]:
    """All Python files of a package."""
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", LAYERS)
def test_no_import_points_to_a_higher_layer(package: str) -> None:
    forbidden = set(LAYERS) - LAYERS[package] - {package} | {"tests"}
    assert modules(package)
    for source in modules(package):
        upward = {name for name in imported_modules(source) if name.split(".")[0] in forbidden}
        assert not upward, f"{source.relative_to(ROOT)} imports {upward}"


def name_of(source: Path) -> str:
    """A module's dotted name; a package's for its __init__."""
    return ".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """For each of our modules, those of ours that it imports."""
    sources = {name_of(source): source for package in LAYERS for source in modules(package)}

    def imported(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A package that is only on the way to one of its modules does not count.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in sources else str(node.module) for name in names)

    return {
        name: {
            other for node in ast.walk(ast.parse(source.read_text())) for other in imported(node)
        }.intersection(sources)
        - {name}
        for name, source in sources.items()
    }


@pytest.mark.parametrize("package", FOLDERS)
def test_inside_a_package_no_import_points_to_a_higher_folder(package: str) -> None:
    def height(name: str) -> int:
        _, folder, *below = name.split(".")
        return FOLDERS[package].index(folder if below or folder in FOLDERS[package] else "")

    inside = {name: others for name, others in imports().items() if name.startswith(package + ".")}
    assert inside
    for name, others in inside.items():
        upward = {o for o in others if o.startswith(package + ".") and height(o) > height(name)}
        assert not upward, f"{name} imports {upward}"


@pytest.mark.parametrize("package", FOLDERS)
def test_no_module_imports_itself_by_way_of_others(package: str) -> None:
    graph = imports()
    for start in graph:
        if not start.startswith(package):
            continue
        reached, ahead = set[str](), [start]
        while ahead:
            found = graph[ahead.pop()] - reached
            assert start not in found, f"{start} is imported by what it imports"
            reached |= found
            ahead += found


@pytest.mark.parametrize("package", FOLDERS)
def test_each_folder_says_what_belongs_there_and_holds_a_dozen_modules_at_most(package: str) -> None:
    for folder in {source.parent for source in modules(package)}:
        count = sum(source.name != "__init__.py" for source in folder.glob("*.py"))
        assert count <= MOST_MODULES, f"{folder.relative_to(ROOT)} has {count} modules"
        assert (folder / "README.md").is_file(), f"{folder.relative_to(ROOT)} has no README.md"


@pytest.mark.parametrize("folder", ["nbdserve/protocol", "nbdserve/channel/wire"])
def test_protocols_do_no_input_or_output(folder: str) -> None:
    for source in modules(folder):
        names = {name.split(".")[0] for name in imported_modules(source)}
        assert not names & IMPURE, f"{source.relative_to(ROOT)} imports {names & IMPURE}"
        inner = {name for name in imported_modules(source) if name.startswith("nbdserve.")}
        allowed = (folder.replace("/", "."), "nbdserve.common.errors")
        assert all(name.startswith(allowed) for name in inner), f"{source.relative_to(ROOT)}: {inner}"


def test_only_one_module_imports_libnbd() -> None:
    users = {
        str(source.relative_to(ROOT))
        for package in LAYERS
        for source in modules(package)
        if "nbd" in {name.split(".")[0] for name in imported_modules(source)}
    }
    assert users == {"nbdserve/client/libnbd.py"}


def test_only_one_folder_imports_the_library_of_qemus_monitor_protocol() -> None:
    users = {
        str(source.parent.relative_to(ROOT))
        for package in LAYERS
        for source in modules(package)
        if "qemu" in {name.split(".")[0] for name in imported_modules(source)}
    }
    assert users == {"nbdserve/qmp"}


def test_threads_are_started_in_one_place_which_knows_that_there_may_be_none() -> None:
    starters = {"Thread", "Timer", "ThreadPoolExecutor", "start_new_thread", "start_joinable_thread"}
    for package in ("nbdserve", "overlay"):
        for source in modules(package):
            if source == ROOT / "nbdserve/common/threads.py":
                continue
            tree = ast.parse(source.read_text(), str(source))
            called = {
                node.func.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            }
            names = {name for name in imported_modules(source) if not name.startswith("nbdserve.")}
            used = called | {name.rsplit(".", 1)[-1] for name in names}
            assert not used & starters, f"{source.relative_to(ROOT)}: use nbdserve.common.threads.Thread"
