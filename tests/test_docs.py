"""The documentation says what is so: its pipelines load, its commands parse, its links lead somewhere.

`python -m tests.test_docs` writes the tables of docs/pipeline-file.md anew from the settings themselves.
"""

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from inferbus.models.onnx import OnnxOptions
from inferbus.models.repository import ModelYaml
from inferbus.worker import cli, metrics, outcomes
from inferbus.worker.pipeline_file import load
from inferbus.worker.settings import PipelineSettings
from tests.test_layout import settings

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "pipeline-file.md"
PLACES = ("*.md", "docs/*.md", "examples/*.md", "deploy/*.md", ".github/*.md")
PAGES = sorted(page for place in PLACES for page in ROOT.glob(place))
TABLES: dict[str, type[BaseModel]] = {"settings": PipelineSettings, "model.yaml": ModelYaml, "options": OnnxOptions}
AS_OF = {"errors": "sink"}  # takes the same places, which are told of once


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


# Tables of settings


def table(model: type[BaseModel]) -> str:
    """Every setting of `model`, its default and what it means; those that repeat others are left out."""
    shown = [(name, field) for name, field in settings(model) if "." not in name or name.partition(".")[0] not in AS_OF]
    rows = [f"| `{name}` | {default(field)} | {meaning(name, field)} |" for name, field in shown]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows]) + "\n"


def meaning(name: str, field: Any) -> str:
    return f"{field.description} Its settings are those of `{AS_OF[name]}`." if name in AS_OF else field.description


def default(field: Any) -> str:
    if field.is_required():
        return "required"
    if field.default in (None, PydanticUndefined, "", {}, ()):
        return ""
    shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f"`{shown}`"


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by tests/test_docs.py -->\n", "<!-- end -->\n"


@pytest.mark.parametrize("name", TABLES)
def test_the_reference_has_every_setting_as_it_is(name: str) -> None:
    begin, end = marks(name)
    shown = REFERENCE.read_text().partition(begin)[2].partition(end)[0]
    assert shown == table(TABLES[name]), "run `python -m tests.test_docs`"


def test_what_is_told_of_once_is_the_same_in_both_places() -> None:
    fields = PipelineSettings.model_fields
    assert [name for name, other in AS_OF.items() if fields[name].annotation != fields[other].annotation] == []


def test_the_readmes_table_is_a_part_of_the_reference() -> None:
    shown = re.findall(r"^\| (`[a-z_.]+`) \| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    known = {f"`{name}`": default(field) for name, field in settings(PipelineSettings)}
    mine = [(name, value) for name, value in shown if name in known]
    assert len(mine) > 8
    assert mine == [(name, known[name]) for name, _ in mine]


# Code blocks


def pipelines() -> list[tuple[str, str]]:
    return [(named(page), text) for page in PAGES for text in blocks(page, "yaml") if text.startswith("name:")]


@pytest.mark.parametrize(("page", "text"), pipelines())
def test_every_pipeline_loads(page: str, text: str, tmp_path: Path) -> None:
    assert page
    (tmp_path / "p.yaml").write_text(text)
    assert load(tmp_path / "p.yaml", environ={"HOSTNAME": "host-0", "KAFKA_PASSWORD": "secret"}).name


def test_the_readme_shows_a_pipeline_of_at_most_ten_lines() -> None:
    first = blocks(ROOT / "README.md", "yaml")[0]
    assert len(first.splitlines()) <= 10


def commands() -> list[str]:
    """Every `inferbus ...` of the pages' shell blocks, continued lines put together."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [m[1] for line in lines if (m := re.match(r"(?:[A-Z_]+=\S+ )*(inferbus [^#|]+)", line))]
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one(command: str) -> None:
    args = cli._parser().parse_args(shlex.split(command)[1:])
    assert args.command not in cli.NOT_YET


def test_the_readme_shows_every_command() -> None:
    shown = {command.split()[1] for command in commands()}
    assert {"demo", "run", "check", "send", "errors"} <= shown


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {target for page in PAGES for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)}
    assert {"demo", "test", "soak"} <= used <= targets


# Names and links


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_metric_is_told_of() -> None:
    names = [n for kind in (metrics.CounterName, metrics.HistogramName, metrics.GaugeName) for n in get_args(kind)]
    for page in ("README.md", "docs/operations.md"):
        text = (ROOT / page).read_text()
        assert [name for name in names if f"`{name}" not in text] == []


def test_every_error_code_and_stage_is_told_of() -> None:
    for page in ("README.md", "docs/messages.md"):
        text = (ROOT / page).read_text()
        words = (*get_args(outcomes.Code), *get_args(outcomes.Stage))
        assert [word for word in words if f"`{word}`" not in text] == []


def test_every_test_named_as_a_witness_exists() -> None:
    there = {name for file in (ROOT / "tests").glob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    named_ones = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text()))
    assert len(named_ones) > 10
    assert named_ones <= there


def write_tables() -> None:
    text = REFERENCE.read_text()
    for name, model in TABLES.items():
        begin, end = marks(name)
        before, _, rest = text.partition(begin)
        text = before + begin + table(model) + end + rest.partition(end)[2]
    REFERENCE.write_text(text)


if __name__ == "__main__":
    write_tables()
