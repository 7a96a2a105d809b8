"""From a pipeline file to settings: YAML with lines, overrides, variables, and every mistake named at once.

`load` reads the YAML into plain values and notes the line of each, lays the `--set` overrides over them,
replaces `${...}`, and gives the result to the models in `settings`. What they refuse is told in the
file's own terms: `file:line: path: what is wrong, what is allowed`.

Invariant: a secret (from `${file:...}`, from a variable or under a key whose name says so) is in the settings
and nowhere else: every problem passes the redactor before it leaves this module.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from inferbus.connectors.base import Misconfigured
from inferbus.worker.settings import (
    PipelineSettings,
    Redactor,
    Way,
    completed,
    contradictions,
    is_secret_key,
    model_key,
)

_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML was built with it

_LATER_KEYS = {("shadow",)}
_LATER_VALUES = {
    ("requests", "format"): ("avro", "protobuf", "jsonschema"),
    ("delivery",): ("exactly-once",),
}

_VARIABLE = re.compile(r"\$\$|\$\{([^}]*)\}?")
_PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")


class PipelineFileError(Misconfigured):
    """The pipeline file is wrong: every problem, one line each, free of secrets."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class Problem(NamedTuple):
    """One mistake: the way to it, and what is wrong and what is allowed."""

    way: Way
    text: str


def load(path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> PipelineSettings:
    """The pipeline that the file at `path` describes, complete with its defaults.

    Args:
        path: A YAML file. Paths in it are relative to its folder.
        overrides: `a.b=value` each, `value` in YAML; the last one wins. List items by position: `sink.0`, which is
            also the only place where the file has no list.
        environ: What `${VAR}` refers to.

    Raises:
        PipelineFileError: With every problem of the file and of the overrides at once.
    """
    draft = Draft(Path(path))
    draft.read()
    for override in overrides:
        draft.override(override, environ)
    draft.values = draft.expand(draft.values, (), environ)
    return draft.settings()


class Draft:
    """The file's values on their way to being settings: where each is written, and what is wrong so far.

    Until they are validated they may be of any type and depth.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: Any = None
        self.problems: list[Problem] = []
        self.secrets: list[str] = []
        self._lines: dict[Way, int | str] = {(): 1}  # line in the file, or the override as the user typed it

    # Reading

    def read(self) -> None:
        """Take the values from the file, and note the line of each."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except OSError as error:
            raise PipelineFileError([f"{self.path}: cannot be read: {error.strerror}"]) from None
        except UnicodeDecodeError:
            raise PipelineFileError([f"{self.path}: is not text in UTF-8"]) from None
        try:
            self.values = self._parsed(text, ()) or {}
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark else ""
            raise PipelineFileError([f"{self.path}{line}: is not valid YAML: {_why(error, text)}"]) from None
        except (ReaderError, RecursionError) as error:
            why = error.reason if isinstance(error, ReaderError) else "it is nested without end"
            raise PipelineFileError([f"{self.path}: is not valid YAML: {why}"]) from None

    def _parsed(self, text: str, way: Way) -> Any:
        loader = _Safe(text)
        try:
            root = loader.get_single_node()
            return None if root is None else self._plain(loader, root, way)
        finally:
            loader.dispose()

    def _plain(self, loader: Any, node: yaml.Node, way: Way) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(loader, node, way)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self._lines[*way, i] = item.start_mark.line + 1
            return [self._plain(loader, item, (*way, i)) for i, item in enumerate(node.value)]
        try:
            value = loader.construct_object(node)
        except ValueError:  # looks like a date and is none
            return node.value
        # What librdkafka is given is text: a password 0123 must not become the number 83 on its way there.
        return node.value if "config" in way and type(value) in (int, float) else value

    def _mapping(self, loader: Any, node: yaml.MappingNode, way: Way) -> dict[str, Any]:
        own: dict[str, int] = {}
        for key, _ in node.value:
            name, line = _key(key), key.start_mark.line + 1
            if name in own and name != "<<":
                text = f"is written twice, first in line {own[name]}; keep one"
                self.problems.append(Problem((*way, name), text))
            own.setdefault(name, line)
        loader.flatten_mapping(node)  # `<<: *defaults`: what is merged comes first, so that what is own wins
        values = {}
        for key, value in node.value:
            name = _key(key)
            self._lines[*way, name] = key.start_mark.line + 1
            values[name] = self._plain(loader, value, (*way, name))
        return values

    # Overrides

    def override(self, text: str, environ: Mapping[str, str]) -> None:
        """Lay one `a.b=value` over the file's values; `environ` may say what a short form in the file stands for."""
        dotted, equals, written = text.partition("=")
        if not equals or not all(dotted.split(".")):
            raise PipelineFileError([f"--set {dotted}: expected a.b=value"])
        # Keys under `config` have dots of their own: `source.kafka.config.sasl.password`.
        head, config, key = dotted.partition(".config.")
        steps = [*head.split("."), "config", key] if config else dotted.split(".")
        self._widen(steps, environ)
        try:
            value = self._parsed(written, tuple(steps))
        except (yaml.YAMLError, RecursionError):
            raise PipelineFileError([f"--set {dotted}: the value is not valid YAML"]) from None
        way = self._lay(steps, value)
        self._lines = {w: line for w, line in self._lines.items() if w[: len(way)] != way}
        self._lines[way] = f"--set {dotted}"

    def _widen(self, steps: list[str], environ: Mapping[str, str]) -> None:
        """Make `steps` lead where the file has a short form: a model as text, one place without its list."""
        inside = self.values.get(steps[0]) if isinstance(self.values, dict) and len(steps) > 1 else None
        if steps[0] == "model" and isinstance(inside, str):
            # What it stands for may hang on a variable, but it is expanded only once, with all the rest.
            self.values["model"] = {model_key(Draft(self.path).expand(inside, (), environ)): inside}
        elif steps[0] in ("sink", "errors") and steps[1:2] == ["0"] and not isinstance(inside, list):
            del steps[1]

    def _lay(self, steps: Sequence[str], value: Any) -> Way:
        """Put `value` where `steps` lead, making mappings on the way; returns the way."""
        at: Any = self.values
        way: Way = ()
        for position, step in enumerate(steps):
            last = position == len(steps) - 1
            if isinstance(at, dict):
                way = (*way, step)
                at[step] = value if last else {} if at.get(step) is None else at[step]
                at = at[step]
            elif isinstance(at, list) and step.isdecimal() and int(step) < len(at):
                way = (*way, int(step))
                at[int(step)] = value if last else at[int(step)]
                at = at[int(step)]
            else:
                kind = f"a list of {len(at)}" if isinstance(at, list) else "no mapping"
                text = f"cannot be set: {_dotted(way) or 'the whole'} is {kind} in the file"
                way = (*way, step)
                self.problems.append(Problem(way, text))
                break
        return way

    # Variables

    def expand(self, value: Any, way: Way, environ: Mapping[str, str]) -> Any:
        """`value` with every `${...}` in its strings replaced; notes the secrets it meets."""
        if isinstance(value, dict):
            return {key: self.expand(item, (*way, key), environ) for key, item in value.items()}
        if isinstance(value, list):
            return [self.expand(item, (*way, i), environ) for i, item in enumerate(value)]
        if isinstance(value, str):
            value = _VARIABLE.sub(lambda found: self._replacement(found, way, environ), value)
            self.secrets += _PASSWORD_IN_URL.findall(value)
        # A user's name is masked where it stands, but struck from no log line: topics may be called the same.
        if value is not None and _is_secret(way) and not str(way[-1]).endswith("username"):
            self.secrets.append(str(value))
        return value

    def _replacement(self, found: re.Match[str], way: Way, environ: Mapping[str, str]) -> str:
        if found[0] == "$$":
            return "$"
        try:
            text, secret = self._look_up(found, environ)
        except ValueError as error:
            self.problems.append(Problem(way, str(error)))
            return ""  # under a secret's key the rest is a secret, and this reference none
        if secret:
            self.secrets.append(text)
        return text

    def _look_up(self, found: re.Match[str], environ: Mapping[str, str]) -> tuple[str, bool]:
        """What a `${...}` stands for, and whether that is a secret; `ValueError` says why for nothing."""
        reference = found[1]
        if reference.startswith("file:") and found[0].endswith("}"):
            try:
                text = (self.path.parent / reference.removeprefix("file:")).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
                raise ValueError(f"{found[0]} cannot be read: {why}") from None
            return text.rstrip("\r\n"), True
        parts = re.fullmatch(r"\$\{([A-Za-z_]\w*)(?::-([^$]*))?\}", found[0])
        if parts is None:
            raise ValueError("expected ${VAR}, ${VAR:-default} or ${file:/path}; a plain $ is written $$")
        name, default = parts.groups()
        text = environ.get(name) or default
        if text is None and name not in environ:
            raise ValueError(f"the variable {name} is not set; set it, or write ${{{name}:-default}}")
        return text or "", is_secret_key(name)

    # Validating

    def settings(self) -> PipelineSettings:
        """The settings, or `PipelineFileError` with everything that is wrong."""
        redact = Redactor(frozenset(self.secrets))
        self.problems += _not_yet(self.values, ())
        settings = None
        try:
            settings = self._validated(self.values)
        except ValidationError as error:
            self.problems += self._refused(error)
        if self.problems:
            # Look past the mistakes found so far for settings that contradict each other: all in one go.
            with contextlib.suppress(ValidationError):
                settings = self._validated(_without(self.values, [way for way, _ in self.problems]))
        if settings is not None:
            settings = completed(settings)
            self.problems += self._contradictions(settings)
        if settings is None or self.problems:
            raise PipelineFileError([redact(line) for line in self._told()])
        settings._redact = redact  # noqa: SLF001 - theirs to read, ours to give
        return settings

    def _validated(self, values: Any) -> PipelineSettings:
        return PipelineSettings.model_validate(values, context={"folder": self.path.parent})

    def _refused(self, error: ValidationError) -> list[Problem]:
        """What the models refused and no problem tells yet."""
        known = {way for way, _ in self.problems}
        begun = {way[:-1] for way, _ in _not_yet(self.values, ())}
        details = [(self._walk(detail["loc"]), detail) for detail in error.errors(include_url=False)]
        return [
            Problem(way, _explained(detail, way))
            for way, detail in details
            # `source: {sqs: ...}` is told that sqs is not available yet, not that it lacks kafka as well.
            if way not in known and not (detail["type"] == "missing" and way[:-1] in begun)
        ]

    def _contradictions(self, settings: PipelineSettings) -> list[Problem]:
        """What is wrong only together, and not merely because a default stands in for a mistake."""
        wrong = [way for way, _ in self.problems]
        found = [([self._walk(way) for way in ways], text) for ways, text in contradictions(settings)]
        return [
            Problem(ways[0], text)
            for ways, text in found
            if not any(a[: len(b)] == b or b[: len(a)] == a for a in ways for b in wrong)
        ]

    def _walk(self, way: Way) -> Way:
        """The same place as the file has it: `sink` may be one place or a list, `model` text or a mapping."""
        at: Any = self.values
        walked: Way = ()
        for step in way:
            if isinstance(at, dict) and isinstance(step, str):
                at = at.get(step, {})
            elif isinstance(at, list) and isinstance(step, int):
                at = at[step]
            elif isinstance(step, int):
                continue
            else:
                break
            walked = (*walked, step)
        return walked

    def _told(self) -> list[str]:
        """The problems in the order of the file, each once, overrides last."""
        lines = {}
        for way, text in self.problems:
            line = next(self._lines[way[:n]] for n in range(len(way), -1, -1) if way[:n] in self._lines)
            place = f"{self.path}:{line}" if isinstance(line, int) else line
            # What an override sets is named already where the place should be.
            named = "" if place == f"--set {_dotted(way)}" else _dotted(way)
            told = ": ".join(filter(None, (place, named, text)))
            lines[told] = (isinstance(line, str), line)
        return sorted(lines, key=lambda told: lines[told])


def schema() -> dict[str, Any]:
    """The JSON Schema of the pipeline file, for editors; a `${VAR}` may stand wherever a plain value may."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_or_variable(PipelineSettings.model_json_schema()),
        "title": "Inferbus pipeline",
    }


def _or_variable(node: Any) -> Any:
    if isinstance(node, list):
        return [_or_variable(item) for item in node]
    if not isinstance(node, dict):
        return node
    if any(map(_is_plain, node.get("anyOf", ()))):
        return {**node, "anyOf": [*node["anyOf"], _ANY_VARIABLE]}
    if _is_plain(node):
        about = {key: node[key] for key in ("title", "description", "default", "unit") if key in node}
        rest = {key: value for key, value in node.items() if key not in about}
        return {**about, "anyOf": [rest, _ANY_VARIABLE]}
    return {key: _or_variable(value) for key, value in node.items()}


def _is_plain(node: dict[str, Any]) -> bool:
    """Whether a text with a variable in it would be refused though what it stands for is right."""
    return node.get("type") in ("integer", "number", "boolean") or "enum" in node or "pattern" in node


_ANY_VARIABLE = {"type": "string", "pattern": r"\$\{.+\}"}


def _why(error: yaml.MarkedYAMLError, text: str) -> str:
    """What is wrong with YAML, with the cure of the two commonest mistakes."""
    begun = f"{error.context} " if isinstance(error, ComposerError) and error.context else ""
    why = f"{begun}{error.problem}"
    if mark := error.problem_mark:
        line = (text.split("\n")[mark.line :] or [""])[0]
        before, after = line[: mark.column], line[mark.column :]
        if after.startswith("\t"):
            return "it is indented with a tab; indent with spaces"
        if before.endswith("$") and after.startswith("{"):
            return f"{why}; put ${{...}} in quotes"
    return why


def _key(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else "?"


def _dotted(way: Way) -> str:
    return ".".join(map(str, way))


def _is_secret(way: Way) -> bool:
    return any(isinstance(step, str) and is_secret_key(step) for step in way)


def _not_yet(value: Any, way: Way) -> Iterator[Problem]:
    """Everything in the file that this release knows by name only."""
    keys = tuple(step for step in way if isinstance(step, str))
    if keys in _LATER_KEYS:
        yield Problem(way, "not available yet")
    elif value in _LATER_VALUES.get(keys, ()):
        yield Problem(way, f"{value} is not available yet")
    elif isinstance(value, dict | list):
        for step, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_yet(item, (*way, step))


def _without(values: Any, ways: Iterable[Way]) -> Any:
    """A copy of `values` that lacks what lies at `ways`."""
    if isinstance(values, dict):
        kept = {key: item for key, item in values.items() if (key,) not in ways}
        return {key: _without(item, {w[1:] for w in ways if w[:1] == (key,)}) for key, item in kept.items()}
    if isinstance(values, list):
        below = [{w[1:] for w in ways if w[:1] == (i,)} for i in range(len(values))]
        return [_without(item, ways) for item, ways in zip(values, below, strict=True) if () not in ways]
    return values


def _explained(error: ErrorDetails, way: Way) -> str:
    """What pydantic refused, in words for someone who knows YAML and not pydantic."""
    kind, value = error["type"], error["input"]
    if kind == "missing":
        return f"is missing; expected: {_model_at(way[:-1]).model_fields[str(way[-1])].description}"
    if kind == "extra_forbidden":
        return _unknown_key(str(way[-1]), list(_model_at(way[:-1]).model_fields))
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind in _EXPECTED:
        expected = _EXPECTED[kind].format(**error.get("ctx", {}))
    else:
        expected = error["msg"].replace("Input should be", "expected")
    hint = "; put it in quotes" if kind == "string_type" and isinstance(value, bool | int | float) else ""
    return expected if _is_secret(way) else f"{expected}, got {_described(value)}{hint}"


_EXPECTED = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "expected a mapping (`key: value`)"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "expected a whole number"),
    **dict.fromkeys(("string_type", "string_too_short", "path_type"), "expected text"),
    "greater_than_equal": "expected at least {ge}",
    "greater_than": "expected more than {gt:g}",
    "less_than_equal": "expected at most {le}",
}


def _described(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _unknown_key(key: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(key.lower(), allowed, n=1)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; allowed: {', '.join(allowed)}"


def _model_at(way: Way) -> type[BaseModel]:
    """The model that says which keys are allowed at `way`."""
    model: type[BaseModel] = PipelineSettings
    for step in way:
        if isinstance(step, str):
            model = next(_models_in(model.model_fields[step].annotation))
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
