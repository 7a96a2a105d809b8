"""Finds the model a pipeline names: a file, or a name in a repository of `<name>/<version>/` folders.

The first thing a worker does, before any device is touched. What is found is fixed: name, version and file
never change under a running worker, whatever becomes of an alias. Nothing outside a repository's folder is
served from it.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from inferbus.models.base import DATATYPES, Executor, InvalidModel, Signature, TensorSpec
from inferbus.models.onnx import OnnxExecutor
from inferbus.models.python import PythonExecutor

_EXECUTORS = {".onnx": "onnxruntime", ".py": "python"}
_LATER = {".pt2": "torch", ".pt": "torch", ".safetensors": "torch"}
_LATER_EXECUTORS = ("torch", "neuron")


def _known_datatype(datatype: str) -> str:
    if datatype not in DATATYPES:
        raise ValueError(f"expected one of {', '.join(DATATYPES)}")
    return datatype


def _batch_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    if not shape or shape[0] != -1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError("expected -1 for the batch axis, then sizes, -1 where a size is free")
    return shape


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSettings(_Frozen):
    """One input or output in model.yaml."""

    name: str = Field(min_length=1, description="The tensor's name in the model.")
    datatype: Annotated[str, AfterValidator(_known_datatype)] = Field(description="Open Inference Protocol datatype.")
    shape: Annotated[tuple[int, ...], AfterValidator(_batch_first)] = Field(
        description="Sizes by axis; -1 is the batch axis, and any other size that is free."
    )


class ModelYaml(_Frozen):
    """What model.yaml may say of the model beside it."""

    inputs: tuple[TensorSettings, ...] = Field(default=(), description="What goes in; ONNX files say it.")
    outputs: tuple[TensorSettings, ...] = Field(default=(), description="What comes out; ONNX files say it.")
    executor: str | None = Field(default=None, description="What runs it; default: by the artefact's kind.")
    batch: dict[Literal["max_rows", "max_delay", "max_bytes"], int | str] = Field(
        default={}, description="As `batch` of a pipeline file, which has the last word."
    )
    warmup: dict[str, tuple[PositiveInt, ...]] = Field(
        default={},
        description="By input, the shape of one row to warm up with where sizes are free; default 1 each.",
    )
    sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-fA-F]{64}$",
        description="Hash of the artefact; another file is refused.",
    )
    buckets: object = Field(default=None, description="Not available yet.")
    golden: object = Field(default=None, description="Not available yet.")

    @property
    def signature(self) -> Signature:
        """What is declared; empty where model.yaml is silent."""
        return Signature(
            tuple(TensorSpec(t.name, t.datatype, t.shape) for t in self.inputs),
            tuple(TensorSpec(t.name, t.datatype, t.shape) for t in self.outputs),
        )


@dataclass(frozen=True, slots=True)
class Artefact:
    """One version of one model, found.

    Attributes:
        name: The model's name.
        version: Its folder in the repository, or the first 12 hex digits of a plain file's SHA-256.
        path: The file itself, links resolved.
        executor: `onnxruntime` or `python`.
        settings: What model.yaml says, defaults where there is none.
    """

    name: str
    version: str
    path: Path
    executor: str
    settings: ModelYaml


def locate(model: str | Mapping[str, object], repository: Path | None = None) -> Artefact:
    """Find a model and read its settings.

    Args:
        model: A file, `name[@version|@alias]`, or a mapping with one of `path` and `name`, and perhaps
            `executor`; its other keys are not looked at. A string with a slash or the ending of a model file
            is a file. Relative paths start at the working directory.
        repository: Folder of models, for names.

    Raises:
        InvalidModel: It is not there, or not as it must be. One line: what was wanted, where, what there is.
    """
    given: object = model
    executor = None
    is_file = isinstance(model, str) and ("/" in model or Path(model).suffix in {*_EXECUTORS, *_LATER})
    if isinstance(model, Mapping):
        chosen = [key for key in ("path", "name") if model.get(key) is not None]
        if len(chosen) != 1:
            raise InvalidModel("model: give one of path and name")
        given, is_file, executor = model[chosen[0]], chosen == ["path"], model.get("executor")
    if not isinstance(given, str | Path) or not str(given):
        raise InvalidModel(f"model: expected a file or a name, got {given!r}")
    if is_file:
        return _plain(Path(given), executor)
    if repository is None:
        raise InvalidModel(f"model: {str(given)!r} is a name and no `repository` is set; set one, or give a file")
    return _stored(str(given), repository, executor)


def executors(
    artefact: Artefact,
    device: str = "cpu",
    replicas: int = 1,
    options: Mapping[str, object] | None = None,
    *,
    sharers: int = 1,
) -> list[Executor]:
    """`replicas` executors of one model, none loaded yet.

    Args:
        artefact: From `locate`.
        device: `cpu`, `cuda` or `cuda:N`; all replicas share it.
        replicas: At least 1.
        options: Options of the executor: the fields of `OnnxOptions` for onnxruntime, none for python.
        sharers: Processes like this one on the machine's CPUs, this one included; threads are divided by it.

    Raises:
        InvalidModel: A setting is wrong, or a package is missing.
    """
    name, version, signature = artefact.name, artefact.version, artefact.settings.signature
    if artefact.executor == "onnxruntime":
        return [
            OnnxExecutor(
                artefact.path,
                name,
                version,
                device=device,
                replicas=replicas * sharers,
                options=options,
                declared=signature,
            )
            for _ in range(replicas)
        ]
    if options:
        raise InvalidModel(f"options.{next(iter(options))}: the python executor has no options")
    return [PythonExecutor(artefact.path, name, version, signature=signature, device=device) for _ in range(replicas)]


def _plain(path: Path, executor: object) -> Artefact:
    if path.is_dir():
        raise InvalidModel(f"model: {str(path)!r} is a folder; give the file in it")
    if not path.exists():
        near = [file.name for file in _listed(path.parent) if file.suffix in _EXECUTORS]
        raise InvalidModel(f"model: no file {str(path)!r}; {_there_is(path.name, near, 'model file')}")
    # Several ONNX files in a folder do not share one model.yaml; a Python model always needs it.
    with_settings = path.suffix == ".py" or path.stem == "model"
    settings = _settings(path.with_name("model.yaml")) if with_settings else ModelYaml()
    kind = _executor(path, executor or settings.executor)
    digest = _checked_digest(path, settings)
    return Artefact(path.stem, digest[:12], path.resolve(), kind, settings)


def _stored(given: str, repository: Path, executor: object) -> Artefact:
    name, _, wanted = given.partition("@")
    for part in (name, *([wanted] if "@" in given else [])):
        if not _is_name(part):
            raise InvalidModel(f"model: {given!r}: names and versions are letters, digits, '.', '_' and '-'")
    if not repository.is_dir():
        raise InvalidModel(f"repository: no folder {str(repository)!r}")
    names = [folder.name for folder in _folders(repository)]
    if name not in names:
        raise InvalidModel(f"model: no {name!r} in {str(repository)!r}; {_there_is(name, names, 'model')}")
    versions = sorted((folder.name for folder in _folders(repository / name)), key=_natural)
    aliases = _aliases(repository, name)
    if not versions:
        raise InvalidModel(f"model: {name!r} in {str(repository)!r} has no versions")
    version = aliases.get(wanted or "live", wanted or versions[-1])
    if version not in versions:
        through = f" (alias {wanted or 'live'!r})" if (wanted or "live") in aliases else ""
        there = _there_is(version, [*aliases, *versions], "version")
        where = f"{name!r} in {str(repository)!r}"
        raise InvalidModel(f"model: no version {version!r}{through} of {where}; {there}")
    folder = repository / name / version
    path = _one_artefact(folder, f"{name}/{version}")
    _stay_inside(repository, path)
    _stay_inside(repository, folder / "model.yaml")
    settings = _settings(folder / "model.yaml")
    kind = _executor(path, executor or settings.executor)
    if settings.sha256 is not None:
        _checked_digest(path, settings)
    return Artefact(name, version, path.resolve(), kind, settings)


def _one_artefact(folder: Path, where: str) -> Path:
    names = {file.name for file in _listed(folder)}
    found = [name for name in (f"model{suffix}" for suffix in {**_EXECUTORS, **_LATER}) if name in names]
    if "model.safetensors" in found and "model.py" in found:  # weights and the module that holds them are one
        found.remove("model.py")
    if len(found) != 1:
        has = f"both {found[0]} and {found[1]}: keep one" if found else "neither model.onnx nor model.py"
        raise InvalidModel(f"model: {where} holds {has}")
    return folder / found[0]


def _executor(path: Path, asked: object) -> str:
    """Which executor runs this file; `asked` is the user's word or None."""
    if path.suffix in _LATER or asked in _LATER_EXECUTORS:
        raise InvalidModel(f"model: {path.name}: {asked or _LATER[path.suffix]} models are not available yet")
    own = _EXECUTORS.get(path.suffix)
    if own is None:
        raise InvalidModel(f"model: {path.name}: expected a file that ends in {' or '.join(_EXECUTORS)}")
    if asked is not None and asked != own:
        raise InvalidModel(f"executor: {asked!r} does not run {path.name}; {own} does")
    return own


def _settings(path: Path) -> ModelYaml:
    if not path.exists():
        return ModelYaml()
    try:
        settings = ModelYaml.model_validate(_read_yaml(path, yaml.SafeLoader))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = [*ModelYaml.model_fields, *TensorSettings.model_fields]
            what = f"unknown; {_there_is(str(first['loc'][-1]), known, 'key')}"
        raise InvalidModel(f"{_short(path)}: {where}: {what}") from None
    for key in ("buckets", "golden"):
        if getattr(settings, key) is not None:
            raise InvalidModel(f"{_short(path)}: {key}: not available yet")
    return settings


def _aliases(root: Path, name: str) -> dict[str, str]:
    path = root / name / "aliases.yaml"
    if not path.exists():
        return {}
    _stay_inside(root, path)
    # BaseLoader reads every scalar as text: version 1.10 is not the number 1.1.
    aliases = _read_yaml(path, yaml.BaseLoader)
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in aliases.items()):
        raise InvalidModel(f"{_short(path)}: expected one version per alias, as in `live: 3`")
    return {str(key): str(value) for key, value in aliases.items()}


def _read_yaml(path: Path, loader: type[yaml.SafeLoader | yaml.BaseLoader]) -> dict[object, object]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), loader)  # noqa: S506 - both build plain values only
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InvalidModel(f"{_short(path)}{line}: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidModel(f"{_short(path)}: cannot be read: {type(error).__name__}") from None
    if content is None or content == "":
        return {}
    if not isinstance(content, dict):
        raise InvalidModel(f"{_short(path)}: expected `key: value` lines")
    return content


def _checked_digest(path: Path, settings: ModelYaml) -> str:
    """SHA-256 of the file in hex, which must be the one that model.yaml asks for."""
    if not path.is_file():
        raise InvalidModel(f"model: {path.name} is not a regular file")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidModel(f"model: {path.name} cannot be read: {error.strerror}") from None
    if settings.sha256 is not None and settings.sha256.lower() != digest:
        raise InvalidModel(f"model.yaml: sha256: {path.name} has {digest}")
    return digest


def _stay_inside(root: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()):
        raise InvalidModel(f"model: {path.relative_to(root)} is a link that leaves the repository")


def _is_name(text: str) -> bool:
    # No leading dot either: `.git`, and the `..data` of a mounted ConfigMap.
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", text) is not None and ".." not in text


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _folders(folder: Path) -> list[Path]:
    return [item for item in _listed(folder) if item.is_dir() and _is_name(item.name)]


def _natural(version: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts 2 before 10, 1.9 before 1.10, and numbers before words."""
    parts = re.findall(r"\d+|\D+", version)
    return tuple((0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts)


def _there_is(wanted: str, names: Iterable[str], what: str) -> str:
    known = list(dict.fromkeys(names))
    near = difflib.get_close_matches(wanted, known, 1, 0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    return f"there is {shown}" if known else f"there is no {what} at all"


def _short(path: Path) -> str:
    """The file and its folder: enough to find it, whatever the repository is called."""
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name
