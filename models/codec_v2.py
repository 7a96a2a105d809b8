"""Open Inference Protocol V2: requests as JSON or as JSON with raw tensors, answers likewise.

First and last step of a message's path for `requests: {format: v2}`; the answers also serve `raw` and `text`.

Read are `id` (a string), `inputs` (`name`, `shape`, `datatype`, and `data`, flat or nested, or raw data announced
by `binary_data_size`), `outputs` (a choice, each with or without `binary_data`) and `binary_data_output`. Other keys
and parameters are ignored. Null stands for an absent `id`, `parameters` or `outputs`; of a key that comes twice the
last one counts. Raw tensors follow the JSON in the order of the inputs; header `inference-header-content-length`
says where the JSON ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from math import prod
from operator import mul
from typing import Any, NamedTuple, cast

import orjson

from inferbus.models.base import Array, InvalidRequest, ModelInfo, Signature, Tensors, TensorSpec, WrongAnswer
from inferbus.models.columns import (
    JSON_ANSWER,
    ChunkDecoder,
    Headers,
    Lane,
    Packers,
    Part,
    Share,
    check_shape,
    dims_text,
    index_text,
    json_texts,
    kind,
    parse_object,
    quote,
    raw_elements,
    refuse,
    row_texts,
    spell_booleans,
    unnest,
)

JSON_LENGTH = "inference-header-content-length"
_LARGE = 32 << 10  # bytes above which a raw tensor is better looked at where it lies than cut out and copied


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks of its answer beyond an id: these outputs in this order, each raw or as JSON."""

    id: str | None
    outputs: tuple[tuple[str, bool], ...]


class V2Answers:
    """Writes V2 responses. An ask is None, the id that stood in the request's body, or an `Ask`."""

    def __init__(self, signature: Signature, info: ModelInfo) -> None:
        self.outputs = {spec.name: spec for spec in signature.outputs}
        self._start = b'{"model_name":%b,"model_version":%b,"id":' % tuple(json_texts((info.name, info.version)))

    def encode(
        self, outputs: Tensors, rows: Sequence[int], asks: Sequence[object], ids: Sequence[str]
    ) -> tuple[list[bytes], list[Headers]]:
        """See `Codec.encode`."""
        kinds = set(map(type, asks))
        told = asks if kinds == {str} else list(map(_answer_id, asks, ids))
        id_texts = json_texts(cast("Sequence[str]", told))
        if Ask in kinds:
            return self._encode_each(outputs, rows, asks, id_texts)
        texts = [_texts(spec, outputs[name], rows) for name, spec in self.outputs.items()]
        templates = {n: self._template(outputs, n).__mod__ for n in set(rows)}
        fields = zip(id_texts, *texts, strict=True)
        if len(templates) == 1:
            bodies = list(map(templates[rows[0]], fields))
        else:
            bodies = [templates[n](own) for n, own in zip(rows, fields, strict=True)]
        return bodies, [JSON_ANSWER] * len(bodies)

    def _template(self, outputs: Tensors, rows: int) -> bytes:
        """The answer to a request of so many rows, `%b` standing for its id and for the elements of each output."""
        tensors = [_tensor_start(spec, outputs[name], rows) for name, spec in self.outputs.items()]
        whole = self._start + b'\0,"outputs":[' + b",".join(tensor + b',"data":[\0]}' for tensor in tensors) + b"]}"
        return whole.replace(b"%", b"%%").replace(b"\0", b"%b")  # JSON text never holds a NUL

    def _encode_each(
        self, outputs: Tensors, rows: Sequence[int], asks: Sequence[object], id_texts: Sequence[bytes]
    ) -> tuple[list[bytes], list[Headers]]:
        everything = tuple((name, False) for name in self.outputs)
        choices = [ask.outputs if isinstance(ask, Ask) else everything for ask in asks]
        as_json = {name for choice in choices for name, raw in choice if not raw}
        texts = {name: _texts(self.outputs[name], outputs[name], rows) for name in as_json}
        bodies: list[bytes] = []
        headers: list[Headers] = []
        for i, (choice, n, end) in enumerate(zip(choices, rows, accumulate(rows), strict=True)):
            tensors, raws = [], []
            for name, raw in choice:
                tensor = _tensor_start(self.outputs[name], outputs[name], n)
                if raw:
                    raws.append(_raw_bytes(self.outputs[name], outputs[name][end - n : end]))
                    tensors.append(tensor + b',"parameters":{"binary_data_size":%d}}' % len(raws[-1]))
                else:
                    tensors.append(tensor + b',"data":[%b]}' % texts[name][i])
            head = self._start + id_texts[i] + b',"outputs":[' + b",".join(tensors) + b"]}"
            bodies.append(b"".join((head, *raws)))
            headers.append(_raw_answer(len(head)) if raws else JSON_ANSWER)
        return bodies, headers


_Shapes = tuple[tuple[int, ...], ...]
"""Shape of every input, in the signature's order."""


class _Layout(NamedTuple):
    """What the shapes of a request come to, worked out once for all requests that have them."""

    rows: int
    lane: Lane
    lengths: tuple[int, ...]  # of the part of each input


class V2Codec(ChunkDecoder, V2Answers):
    """`requests: {format: v2}`: see the module."""

    def __init__(self, signature: Signature, info: ModelInfo, max_elements: int) -> None:
        ChunkDecoder.__init__(self, signature.inputs, max_elements)
        V2Answers.__init__(self, signature, info)
        self._specs = {spec.name: spec for spec in self.inputs}
        self._packers = {spec.name: Packers(spec.datatype) for spec in self.inputs}
        # Where a run keeps what it finds of an input: its shape at the place, its elements behind.
        self._places = {
            spec.name: (1 + 2 * i, spec.datatype, self._packers[spec.name]) for i, spec in enumerate(self.inputs)
        }
        self._room = [None] * (2 * len(self.inputs))
        # Asked with tuples of ints only, for True and 1.0 would find the entry of 1.
        self._layout = lru_cache(maxsize=4096)(self._check_layout)

    def at_once(self, bodies: Sequence[bytes], headers: Sequence[Headers]) -> Iterable[Share]:
        """See `ChunkDecoder.at_once`. After parsing, nearly every line is one pass over the run."""
        raw = any(name.lower() == JSON_LENGTH for name in {name for head in headers for name, _ in head})
        if raw and max(map(len, bodies)) > _LARGE:
            raise LookupError
        read = map(self._parse_and_cut, bodies, headers) if raw else map(self._parse_and_pack, bodies)
        asks, *columns = zip(*read, strict=True)
        layouts, parts = self._layouts(columns[::2]), columns[1::2]
        for j, packed in enumerate(parts):
            if list(map(len, packed)) != [layout.lengths[j] for layout in layouts]:
                raise LookupError
        if raw:
            self._check_raw(parts)
        else:
            self._look_for_booleans(bodies)
        if layouts.count(layouts[0]) == len(layouts) or len({layout.lane for layout in layouts}) == 1:
            return [Share(layouts[0].lane, [layout.rows for layout in layouts], asks, parts)]
        return [
            Share(layout.lane, [layout.rows], [ask], [[part] for part in own])
            for layout, ask, *own in zip(layouts, asks, *parts, strict=True)
        ]

    def _parse_and_pack(self, body: bytes) -> list[Any]:
        """What one request asks, then the shape and the packed elements of each input, in the signature's order.

        Nothing else outlives this call: kept for a run, what was parsed would leave the cache before it is freed, which
        takes a quarter longer.
        """
        request = orjson.loads(body)
        found = self._frame(request)
        for tensor in request["inputs"]:
            place, datatype, packers = self._places[tensor["name"]]
            values = tensor["data"]
            if (
                tensor["datatype"] != datatype
                or type(values) is not list
                or (len(tensor) > 4 and _binary_size(tensor) is not None)
            ):
                raise LookupError
            if type(values[0]) is list:
                values = unnest(values, tensor["shape"], "data")
            found[place] = tensor["shape"]
            found[place + 1] = packers[len(values)](*values)
        return found

    def _frame(self, request: dict[str, Any]) -> list[Any]:
        """What a request asks, and room for its inputs."""
        ask = request.get("id")
        if type(ask) is not str or len(request) > 2:
            ask = self._ask(request)
        if len(request["inputs"]) != len(self.inputs):
            raise LookupError
        return [ask, *self._room]  # where an input comes twice, that of another stays empty, and is no shape

    def _look_for_booleans(self, bodies: Sequence[bytes]) -> None:
        """Packing takes true and false for numbers, so see what the bodies that spell them do with them."""
        for i in spell_booleans(bodies):
            for tensor in orjson.loads(bodies[i])["inputs"]:
                values = tensor["data"]
                while type(values[0]) is list:
                    values = list(chain.from_iterable(values))
                if tensor["datatype"] != "BOOL" and bool in set(map(type, values)):
                    raise LookupError

    def _parse_and_cut(self, body: bytes, headers: Headers) -> list[Any]:
        """As `_parse_and_pack`, of a request all of whose inputs lie raw behind the JSON."""
        end = _json_length(body, headers)
        request = orjson.loads(body[:end])
        found = self._frame(request)
        for tensor in request["inputs"]:
            place, datatype, _ = self._places[tensor["name"]]
            size = _binary_size(tensor)
            if tensor["datatype"] != datatype or size is None or "data" in tensor or datatype == "BYTES":
                raise LookupError
            start, end = end, end + size
            found[place] = tensor["shape"]
            found[place + 1] = body[start:end]
        if end != len(body):
            raise LookupError
        return found

    def _check_raw(self, parts: Sequence[Sequence[bytes]]) -> None:
        """Look at the raw elements of the whole run, each of which has the right length."""
        for spec, cut in zip(self.inputs, parts, strict=True):
            run = memoryview(b"".join(cut))
            raw_elements(spec, run, len(run) // spec.dtype.itemsize)

    def _layouts(self, shapes: Sequence[Sequence[list[int]]]) -> list[_Layout]:
        """The layout of every request of the run; `shapes` has one column for each input."""
        if not {int}.issuperset(map(type, chain.from_iterable(chain.from_iterable(shapes)))):
            raise LookupError
        if all(column.count(column[0]) == len(column) for column in shapes):
            return [self._layout(tuple(tuple(column[0]) for column in shapes))] * len(shapes[0])
        return [self._layout(shape) for shape in zip(*(map(tuple, column) for column in shapes), strict=True)]

    def exact(self, body: bytes, headers: Headers) -> Share:
        """See `ChunkDecoder.exact`."""
        head, tail = _split(body, headers)
        request = parse_object(head)
        ask = self._ask(request)
        tensors = self._tensors(request)
        shapes = {name: _dims(i, tensor) for name, (i, tensor) in tensors.items()}
        layout = self._layout(tuple(shapes[spec.name] for spec in self.inputs))
        parts: dict[str, Part] = {}
        for name, (i, tensor) in tensors.items():  # in the order of the request, for so lie raw tensors
            try:
                parts[name] = self._elements(name, tensor, shapes[name], tail)
            except InvalidRequest as fault:
                raise refuse(f"inputs[{i}] {quote(name)}: {fault}") from None
        tail.close()
        return Share(layout.lane, [layout.rows], [ask], [[parts[spec.name]] for spec in self.inputs])

    def _tensors(self, request: dict[str, Any]) -> dict[str, tuple[int, dict[str, Any]]]:
        """The inputs of one request by name, each with its index: all there, of the right datatype."""
        tensors = request.get("inputs", ...)
        if type(tensors) is not list:
            raise refuse(f"inputs is {kind(tensors)}, expected a list")
        found: dict[str, tuple[int, dict[str, Any]]] = {}
        for i, tensor in enumerate(tensors):
            if type(tensor) is not dict:
                raise refuse(f"inputs[{i}] is {kind(tensor)}, expected an object")
            name = tensor.get("name", ...)
            if type(name) is not str:
                raise refuse(f"inputs[{i}]: name is {kind(name)}, expected a string")
            if name not in self._packers:
                raise refuse(f"inputs[{i}] {quote(name)} is unknown, expected {_names(self._packers)}")
            if name in found:
                raise refuse(f"inputs[{i}] {quote(name)} is there twice, expected once")
            datatype, wanted = tensor.get("datatype", ...), self._packers[name].datatype
            if datatype != wanted:
                text = quote(datatype) if type(datatype) is str else kind(datatype)
                raise refuse(f"inputs[{i}] {quote(name)}: datatype is {text}, expected {wanted}")
            found[name] = (i, tensor)
        if len(found) < len(self.inputs):
            raise refuse(f"inputs: {_names(self._packers.keys() - found.keys())} missing")
        return found

    def _check_layout(self, shapes: _Shapes) -> _Layout:
        for spec, dims in zip(self.inputs, shapes, strict=True):
            try:
                check_shape(spec, dims, self.max_elements)
            except InvalidRequest as fault:
                raise refuse(f"input {quote(spec.name)}: {fault}") from None
            if dims[0] != shapes[0][0]:
                first = f"{quote(self.inputs[0].name)} has {shapes[0][0]}"
                raise refuse(f"input {quote(spec.name)}: shape has {dims[0]} rows, but {first}")
        rows, counts = shapes[0][0], [prod(dims) for dims in shapes]
        if rows > 1 and not any(counts):
            # Rows that cost no byte could be claimed by the million, and the model would answer them all.
            raise refuse(f"inputs: {rows} rows without an element, expected 1 at most")
        sizes = [1 if spec.datatype == "BYTES" else spec.dtype.itemsize for spec in self.inputs]
        return _Layout(rows, tuple(dims[1:] for dims in shapes), tuple(map(mul, counts, sizes)))

    def _elements(self, name: str, tensor: dict[str, Any], dims: tuple[int, ...], tail: _Tail) -> Part:
        count = prod(dims)
        values = tensor.get("data", ...)
        size = _binary_size(tensor)
        if size is not None:
            if values is not ...:
                raise refuse("data and binary_data_size are both there, expected one of them")
            return raw_elements(self._specs[name], tail.take(size), count)
        if type(values) is not list:
            raise refuse(f"data is {kind(values)}, expected a list")
        if len(dims) > 1 and values and type(values[0]) is list:
            values = unnest(values, dims, "data")
        elif len(values) != count:
            raise refuse(f"data has {len(values)} elements, expected {count} for shape {dims_text(dims)}")
        else:
            dims = (count,)
        return self._packers[name].exactly(values, lambda at: "data" + index_text(at, dims))

    def _ask(self, request: dict[str, Any]) -> object:
        id_ = request.get("id")
        if id_ is not None and type(id_) is not str:
            raise refuse(f"id is {kind(id_)}, expected a string")
        raw = _flag(request, "binary_data_output", "", default=False)
        outputs = request.get("outputs")
        if outputs is not None and type(outputs) is not list:
            raise refuse(f"outputs is {kind(outputs)}, expected a list")
        if not outputs:
            return Ask(id_, tuple((name, True) for name in self.outputs)) if raw else id_
        chosen: dict[str, bool] = {}
        for i, output in enumerate(outputs):
            if type(output) is not dict:
                raise refuse(f"outputs[{i}] is {kind(output)}, expected an object")
            name = output.get("name")
            if type(name) is not str:
                raise refuse(f"outputs[{i}]: name is {kind(output.get('name', ...))}, expected a string")
            if name not in self.outputs:
                raise refuse(f"outputs[{i}] {quote(name)} is unknown, expected {_names(self.outputs)}")
            if name in chosen:
                raise refuse(f"outputs[{i}] {quote(name)} is there twice, expected once")
            chosen[name] = _flag(output, "binary_data", f"outputs[{i}] {quote(name)}: ", default=raw)
        return Ask(id_, tuple(chosen.items()))


class _Tail:
    """What follows the JSON of one request: raw tensors, to be taken in order."""

    def __init__(self, raw: memoryview | None) -> None:
        self._raw = raw

    def take(self, size: int) -> memoryview:
        if self._raw is None:
            raise refuse(f"binary_data_size came without the header {JSON_LENGTH}")
        if size > len(self._raw):
            raise refuse(f"binary_data_size is {size}, but only {len(self._raw)} bytes are left in the body")
        taken, self._raw = self._raw[:size], self._raw[size:]
        return taken

    def close(self) -> None:
        if self._raw:
            raise refuse(f"body has {len(self._raw)} bytes after the last raw tensor, expected none")


def _split(body: bytes, headers: Headers) -> tuple[bytes | memoryview, _Tail]:
    if all(name.lower() != JSON_LENGTH for name, _ in headers):
        return body, _Tail(None)
    view, length = memoryview(body), _json_length(body, headers)
    return view[:length], _Tail(view[length:])


def _json_length(body: bytes, headers: Headers) -> int:
    """Where the JSON ends and raw tensors begin."""
    lengths = {value or b"" for name, value in headers if name.lower() == JSON_LENGTH}  # Kafka allows no value
    text = lengths.pop()
    if lengths or not text.isdigit() or len(text) > 20 or int(text) > len(body):
        raise refuse(f"header {JSON_LENGTH} is wrong, expected the length of the JSON, an integer up to {len(body)}")
    return int(text)


def _dims(i: int, tensor: dict[str, Any]) -> tuple[int, ...]:
    shape = tensor.get("shape", ...)
    if type(shape) is not list:
        raise refuse(f"inputs[{i}] {quote(tensor['name'])}: shape is {kind(shape)}, expected a list of integers")
    if not {int}.issuperset(map(type, shape)):
        wrong, dim = next((at, dim) for at, dim in enumerate(shape) if type(dim) is not int)
        raise refuse(f"inputs[{i}] {quote(tensor['name'])}: shape[{wrong}] is {kind(dim)}, expected an integer")
    return tuple(shape)


def _binary_size(tensor: dict[str, Any]) -> int | None:
    size = _parameters(tensor).get("binary_data_size")
    if size is not None and (type(size) is not int or size < 0):
        raise refuse(
            f"binary_data_size is {'negative' if type(size) is int else kind(size)}, expected a number of bytes"
        )
    return size


def _flag(owner: dict[str, Any], name: str, where: str, *, default: bool) -> bool:
    flag = _parameters(owner, where).get(name)
    if flag is not None and type(flag) is not bool:
        raise refuse(f"{where}{name} is {kind(flag)}, expected true or false")
    return default if flag is None else flag


def _parameters(owner: dict[str, Any], where: str = "") -> dict[str, Any]:
    parameters = owner.get("parameters")
    if parameters is not None and type(parameters) is not dict:
        raise refuse(f"{where}parameters is {kind(parameters)}, expected an object")
    return parameters or {}


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(quote, sorted(names)))


def _answer_id(ask: object, delivery_id: str) -> str:
    """The id of the request's body, else the delivery's."""
    id_ = ask.id if isinstance(ask, Ask) else ask
    return delivery_id if id_ is None else str(id_)


def _tensor_start(spec: TensorSpec, output: Array, rows: int) -> bytes:
    tensor = {"name": spec.name, "datatype": spec.datatype, "shape": [rows, *output.shape[1:]]}
    return orjson.dumps(tensor)[:-1]


def _texts(spec: TensorSpec, output: Array, rows: Sequence[int]) -> list[bytes]:
    """The elements of every answer as JSON, separated by commas."""
    texts = row_texts(spec, output)
    if len(texts) == len(rows):
        return texts
    return [b",".join(texts[end - n : end]) for n, end in zip(rows, accumulate(rows), strict=True)]


def _raw_bytes(spec: TensorSpec, output: Array) -> bytes:
    if spec.datatype != "BYTES":
        return output.tobytes()
    try:
        strings = [item if isinstance(item, bytes) else item.encode() for item in output.flat]
    except UnicodeEncodeError:
        raise WrongAnswer(f"output {spec.name!r} holds half a surrogate pair, so it cannot be written") from None
    return b"".join(chain.from_iterable((len(string).to_bytes(4, "little"), string) for string in strings))


def _raw_answer(length: int) -> Headers:
    return (("content-type", b"application/octet-stream"), (JSON_LENGTH, b"%d" % length))
