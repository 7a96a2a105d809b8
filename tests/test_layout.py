"""The rules of the house: who imports whom, what has a contract test, what is documented, what things are called."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from inferbus.models.repository import ModelYaml
from inferbus.worker.settings import PipelineSettings

ROOT = Path(__file__).parents[1]
PACKAGES = ("client", "connectors", "models", "worker")
MAY_IMPORT = {
    # The client reads the pipeline file and builds its sink as a worker does; a worker knows nothing of clients.
    "client": {"client", "worker", "connectors", "models"},
    "connectors": {"connectors"},
    "models": {"models"},
    "worker": {"worker", "connectors", "models"},
}
CONTRACTS = {
    r"[A-Z]\w*(Source|Sink)": "ConnectorContract",
    r"[A-Z]\w*Codec": "CodecContract",
    r"[A-Z]\w*Executor": "ExecutorContract",
}
BANNED = {"handle", "manager", "helper", "helpers", "util", "utils", "data"}
# Names the standard library and pika call us by.
NOT_OURS = {"handle_error", "_on_data_available", "_adapter_emit_data"}


def modules(*packages: str) -> list[Path]:
    return sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def named(file: Path) -> str:
    return str(file.relative_to(ROOT))


# Imports


def imports(file: Path) -> Iterator[str]:
    """Every module the file imports, wherever in the file, dotted and from the root."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(file)}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", modules(*PACKAGES), ids=named)
def test_imports_point_one_way(file: Path) -> None:
    imported = [name.split(".") for name in imports(file)]
    ours = {parts[1] for parts in imported if parts[0] == "inferbus"}
    assert ours <= MAY_IMPORT[file.relative_to(ROOT).parts[0]]
    # By its folder's name a package would be imported a second time, as another module.
    assert not {parts[0] for parts in imported} & {*PACKAGES, "tests", "examples", "deploy", "benchmarks"}


def test_the_nouns_of_a_bus_and_of_a_model_need_nothing_else_of_ours() -> None:
    for package in ("connectors", "models"):
        assert not [name for name in imports(ROOT / package / "base.py") if name.startswith("inferbus")]


# Contracts


def implementations() -> list[tuple[str, str]]:
    """Files that hold a source, a sink, a codec or an executor, and the contract each is under."""
    found = {
        (named(file), contract)
        for file in modules("connectors", "models")
        for node in tree(file).body
        if isinstance(node, ast.ClassDef) and file.name != "base.py"
        for pattern, contract in CONTRACTS.items()
        if re.fullmatch(pattern, node.name)
    }
    return sorted(found)


def test_the_rule_sees_what_is_there() -> None:
    files = [file for file, _ in implementations()]
    for expected in ("connectors/kafka.py", "connectors/memory.py", "models/onnx.py", "models/python.py"):
        assert expected in files
    assert {named(file) for file in (ROOT / "models").glob("codec_*.py")} <= set(files)


@pytest.mark.parametrize(("file", "contract"), implementations())
def test_whoever_implements_a_protocol_passes_its_contract(file: str, contract: str) -> None:
    tests = list((ROOT / "tests").glob(f"test_*{Path(file).stem}.py"))
    where = " or ".join(map(named, tests)) or f"tests/test_{Path(file).parent}_{Path(file).stem}.py"
    tried = [name for test in tests for name in subclasses(tree(test), contract) if name.startswith("Test")]
    assert tried, f"{file}: {where} lacks a class that begins with Test and subclasses {contract}"


def subclasses(module: ast.Module, base: str) -> set[str]:
    """Names of the module's classes below `base`, also by way of each other."""
    found = {base}
    for node in module.body:  # a class comes after its bases
        if isinstance(node, ast.ClassDef) and {b.id for b in node.bases if isinstance(b, ast.Name)} & found:
            found.add(node.name)
    return found


# Settings


def settings(model: type[BaseModel], way: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting below `model` by its dotted name, with what pydantic knows of it."""
    for name, field in model.model_fields.items():
        yield way + name, field
        for inner in inner_models(field.annotation):
            yield from settings(inner, f"{way}{name}.")


def inner_models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from inner_models(argument)


@pytest.mark.parametrize("model", [PipelineSettings, ModelYaml])
def test_every_setting_is_described(model: type[BaseModel]) -> None:
    found = dict(settings(model))
    assert len(found) > 5
    assert [name for name, field in found.items() if not (field.description or "").endswith(".")] == []


# Names

DEF = ast.FunctionDef | ast.AsyncFunctionDef


def defined(file: Path) -> Iterator[tuple[str, ast.AST]]:
    """What the file gives a name to: functions, classes, arguments, variables."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.arg):
            yield node.arg, node
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr, node


def words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


@pytest.mark.parametrize("file", modules(*PACKAGES), ids=named)
def test_nothing_is_called_by_a_word_that_says_nothing(file: Path) -> None:
    assert not words(file.stem) & BANNED
    assert [name for name, _ in defined(file) if words(name) & BANNED and name not in NOT_OURS] == []
    # A process may be a thing, as in `subprocess`, but it is nothing to do.
    assert [name for name, node in defined(file) if isinstance(node, DEF) and re.match(r"_?process", name)] == []
