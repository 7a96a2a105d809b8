"""`inferbus check`: would this pipeline start? Serves nothing and joins no group to find out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing

from inferbus.connectors.base import Unavailable
from inferbus.connectors.settings import spell_seconds, spell_size
from inferbus.models.base import Executor, TensorSpec
from inferbus.models.repository import executors
from inferbus.models.warmup import warm_up_input
from inferbus.worker import access, build
from inferbus.worker.devices import warm_up
from inferbus.worker.settings import PipelineSettings, effective

DONE, AWAY = 0, 3


def check(settings: PipelineSettings, *, connect: bool = False) -> int:
    """Load the model, hold the request format against its signature, warm it up, print the effective pipeline.

    Args:
        settings: From a pipeline file that is right by itself.
        connect: Also reach the source and every sink, and say of each how it went.

    Returns:
        The exit code: 3 when a place cannot be reached.

    Raises:
        InvalidModel: The model cannot be served, fails on its warm-up batch, or cannot take this format of requests.
        Misconfigured: A setting of a bus cannot work.
    """
    found = build.artefact(settings)
    bounds = build.limits(settings, found)
    model = settings.model
    # One copy stands for all replicas: they open the same file on the same device.
    with closing(executors(found, model.device, 1, model.options)[0]) as executor:
        executor.load()
        build.codecs(settings, bounds)(executor.signature, executor.info)
        # The batch that `run` begins with: a model that fails on it would never serve.
        warm_up(executor, warm_up_input(executor.signature, bounds.max_rows, found.settings.warmup))
        sys.stdout.write(effective(settings))
        sys.stdout.writelines(_about(executor))
        if found.settings.batch:
            delay, most = spell_seconds(bounds.max_delay), spell_size(bounds.max_batch_bytes)
            sys.stdout.write(f"# batch, with what model.yaml says: {bounds.max_rows} rows, {delay}, {most}\n")
    if not connect:
        return DONE
    sys.stdout.flush()
    reached = [_reach(use, name, place) for use, name, place in _places(settings)]
    return DONE if all(reached) else AWAY


def _about(executor: Executor) -> Iterator[str]:
    """The model as comments, so that the whole is YAML still."""
    info = executor.info
    yield f"# model: {info.name}, version {info.version}, {info.executor} on {info.device}\n"
    yield from _tensors("input", executor.signature.inputs)
    yield from _tensors("output", executor.signature.outputs)


def _tensors(kind: str, specs: Sequence[TensorSpec]) -> Iterator[str]:
    for spec in specs:
        yield f"# {kind}: {spec.name} {spec.datatype} [{', '.join(map(str, spec.shape))}]\n"


def _places(settings: PipelineSettings) -> Iterator[tuple[str, str, AbstractContextManager[object]]]:
    source = settings.source
    yield "source", f"{source.kind} {source.place.label()}", access.reached(settings, source.place)
    for use, sinks in (("sink", settings.sink), ("errors", settings.errors)):
        for sink in sinks:
            yield use, f"{sink.kind} {sink.place.label()}", access.reached(settings, sink.place)
    if (claims := settings.claim_check) is not None:
        yield (
            "claim_check",
            " ".join(dict.fromkeys([*claims.allow, claims.to])),
            access.claims_reached(settings, claims),
        )


def _reach(use: str, name: str, place: AbstractContextManager[object]) -> bool:
    try:
        with place:
            sys.stderr.write(f"{use}: {name}: reached\n")
    except Unavailable as error:
        sys.stderr.write(f"{use}: {error}\n")
        return False
    return True
