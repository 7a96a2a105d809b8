"""A user's own model: one subclass of `inferbus.models.Model` in a file `model.py`.

The file is run from its source under a private name, once per executor, so replicas and versions never
share state and never take the name of a module that somebody imports. It stands alone: its folder is not on
`sys.path`, because two versions with a `features.py` each would then silently share one of them. What a
model needs beside it belongs into an installed package.

Runs in the calling thread; the model decides for itself which device it uses.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import sys
import traceback
from pathlib import Path
from types import CodeType, ModuleType
from typing import cast

import numpy as np

from inferbus.models.base import InvalidModel, Model, ModelInfo, Signature, Tensors

_numbers = itertools.count()


class PythonExecutor:
    """One instance of a user's class.

    Attributes:
        signature: As declared.
        info: Who answers, for outcomes and metrics.
    """

    def __init__(self, path: Path, name: str, version: str, *, signature: Signature, device: str = "cpu") -> None:
        """The file is read in `load`.

        Args:
            path: The `model.py`.
            name: The model's name.
            version: The model's version.
            signature: Inputs and outputs, from model.yaml.
            device: What metrics shall say; the model itself picks its device.

        Raises:
            InvalidModel: The signature has no inputs or no outputs.
        """
        self._label = f"model {name}@{version}"
        self._path = path
        self._module: str | None = None
        self._model: Model | None = None
        if not signature.inputs or not signature.outputs:
            raise InvalidModel(f"{self._label}: give its inputs and outputs in model.yaml beside {path.name}")
        self.signature = signature
        self.any_thread = False  # a user's model may keep things that belong to its thread, as torch's modes do
        self.info = ModelInfo(name, version, "python", device)

    def load(self) -> None:
        """Run the file, make the one model in it and call its `load`; a loaded model is kept.

        Raises:
            InvalidModel: Any of that failed, or there is not exactly one model.
        """
        if self._model is not None:
            return
        try:
            model = _only_model(self._run())()
            model.load()
        except BaseException as error:  # a user's code may raise anything, and call sys.exit
            self.close()
            if isinstance(error, KeyboardInterrupt):
                raise
            raise InvalidModel(f"{self._label}: {self._where(error)}: {_told(error)}") from error
        self._model = model

    def predict(self, inputs: Tensors) -> Tensors:
        """What the model answers, unchecked. Raises whatever it raises, with a note of the line."""
        if self._model is None:
            raise RuntimeError("predict before load")
        try:
            # A model may work in place, and a batch that fails is predicted again in halves: from the same numbers.
            outputs: object = self._model.predict({name: array.copy() for name, array in inputs.items()})
        except BaseException as error:
            error.add_note(self._where(error))
            raise
        if not isinstance(outputs, dict):
            return cast("Tensors", outputs)  # which `check_outputs` refuses
        # A model may fill arrays it keeps, and predict again before the answers of this batch have been written.
        return {name: array.copy() if isinstance(array, np.ndarray) else array for name, array in outputs.items()}

    def close(self) -> None:
        """Forget the model. Idempotent."""
        self._model = None
        if self._module is not None:
            sys.modules.pop(self._module, None)
            self._module = None

    def _run(self) -> ModuleType:
        name = f"_inferbus_model_{next(_numbers)}"
        loader = _Source(name, str(self._path))
        spec = importlib.machinery.ModuleSpec(name, loader, origin=str(self._path))
        spec.has_location = True  # gives the module its `__file__`, to find weights beside it
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and pickles of the user's classes look their module up by name.
        sys.modules[name] = module
        self._module = name
        loader.exec_module(module)
        return module

    def _where(self, error: BaseException) -> str:
        """The file, and the last of its lines that was running."""
        own = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(self._path)]
        if isinstance(error, SyntaxError) and error.filename == str(self._path):
            own = [error.lineno]
        return f"{self._path.name} line {own[-1]}" if own else self._path.name


class _Source(importlib.machinery.SourceFileLoader):
    """Compiles what the file says now: a cached .pyc goes by its time stamp, and a model by its hash."""

    def get_code(self, fullname: str) -> CodeType | None:
        del fullname
        return self.source_to_code(self.get_data(self.path), self.path)


def _only_model(module: ModuleType) -> type[Model]:
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Model) and item.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(item.__name__ for item in found) or "none"
        raise ValueError(f"expected exactly one subclass of inferbus.models.Model, found {names}")
    if found[0].predict is Model.predict:
        raise ValueError(f"{found[0].__name__} has no predict(self, inputs)")
    return found[0]


def _told(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    if isinstance(error, ModuleNotFoundError):
        text += " (files beside model.py cannot be imported: install them as a package)"
    return " ".join(f"{type(error).__name__}: {text}".split())
