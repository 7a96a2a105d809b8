"""What every codec must do. Subclass once per codec, say how to make one, what it takes and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferbus.models.base import Array, Codec, Decoded, ModelInfo, Signature, Tensors, TensorSpec
from inferbus.models.codecs import codec
from inferbus.models.columns import ChunkDecoder, Headers, Share

INFO = ModelInfo("dig%its", 'v"1', "onnx", "cpu")  # names that a careless template would choke on
JSON_LENGTH = "inference-header-content-length"


@dataclass
class Request:
    """One message, and the tensors a codec must find in it."""

    body: bytes
    inputs: Tensors
    headers: Headers = ()


@dataclass
class Answer:
    """What a reader finds in one answer."""

    id: str
    outputs: Tensors


def same(left: Tensors, right: Tensors) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and np.array_equal(left[name], right[name])
        for name in left
    )


def decode(codec: Codec, requests: Sequence[Request]) -> Decoded:
    return codec.decode([request.body for request in requests], [request.headers for request in requests])


def refusal(codec: Codec, body: bytes, headers: Headers = ()) -> str:
    """Why a codec refuses a message that it must refuse."""
    decoded = codec.decode([body], [headers])
    assert not decoded.groups
    ((position, reason),) = decoded.rejects
    assert position == 0
    return str(reason)


def per_request(decoded: Decoded) -> dict[int, Tensors]:
    """The tensors of every good request by its position."""
    found: dict[int, Tensors] = {}
    for group in decoded.groups:
        assert len(group.positions) == len(group.rows) == len(group.asks)
        assert list(group.positions) == sorted(group.positions)
        assert all(len(column) == sum(group.rows) for column in group.columns.values())
        ends = np.cumsum(group.rows)
        for position, rows, end in zip(group.positions, group.rows, ends, strict=True):
            assert position not in found
            assert rows >= 1
            found[position] = {name: column[end - rows : end] for name, column in group.columns.items()}
    return found


def outputs_for(specs: Sequence[TensorSpec], rows: int, rng: np.random.Generator) -> Tensors:
    """Outputs a model could give, free dimensions as 3."""
    outputs: Tensors = {}
    for spec in specs:
        shape = (rows, *(3 if dim == -1 else dim for dim in spec.row_shape))
        if spec.datatype == "BYTES":
            strings = np.empty(shape, object)
            strings.ravel()[:] = [f'"{i}",\n  "ü\\' for i in range(strings.size)]
            outputs[spec.name] = strings
        elif spec.datatype == "BOOL":
            outputs[spec.name] = rng.random(shape) < 0.5
        elif spec.datatype.startswith("FP"):
            outputs[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            limits = np.iinfo(spec.dtype)
            outputs[spec.name] = rng.integers(limits.min, limits.max, shape, spec.dtype, endpoint=True)
    return outputs


def read_v2(body: bytes, headers: Headers, outputs: Sequence[TensorSpec]) -> Answer:
    """A V2 response, read without a line of the code under test."""
    told = dict(headers)
    head = body[: int(told[JSON_LENGTH])] if JSON_LENGTH in told else body
    raw = body[len(head) :]
    answer = orjson.loads(head)
    assert list(answer) == ["model_name", "model_version", "id", "outputs"]
    assert (answer["model_name"], answer["model_version"]) == (INFO.name, INFO.version)
    specs, tensors = {spec.name: spec for spec in outputs}, {}
    for tensor in answer["outputs"]:
        spec = specs[tensor["name"]]
        assert tensor["datatype"] == spec.datatype
        if "data" in tensor:
            array = np.array(tensor["data"], spec.dtype)
        else:
            size = tensor["parameters"]["binary_data_size"]
            mine, raw = raw[:size], raw[size:]
            array = raw_array(mine, spec)
        tensors[spec.name] = array.reshape(tensor["shape"])
    assert raw == b""
    return Answer(answer["id"], tensors)


def raw_array(raw: bytes, spec: TensorSpec) -> Array:
    if spec.datatype != "BYTES":
        return np.frombuffer(raw, spec.dtype)
    strings = []
    while raw:
        end = 4 + int.from_bytes(raw[:4], "little")
        strings.append(raw[4:end].decode())
        raw = raw[end:]
    return np.array(strings, object)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])


class CodecContract:
    """The promises of `Codec`, tried on the codec of `format` for `signature`."""

    format: str
    signature: Signature

    def make(self) -> Codec:
        return codec(self.format, self.signature, INFO)

    def good(self, serial: int) -> Request:
        """A request unlike those of other serials."""
        raise NotImplementedError

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        """Messages to be refused: what is wrong, body, headers."""
        raise NotImplementedError

    def read(self, body: bytes, headers: Headers) -> Answer:
        """One answer, read without the code under test."""
        return read_v2(body, headers, self.signature.outputs)

    def goods(self, count: int, first: int = 0) -> list[Request]:
        return [self.good(serial) for serial in range(first, first + count)]

    def test_no_messages_are_no_groups(self) -> None:
        assert self.make().decode([], []) == Decoded([], [])

    @pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 300])
    def test_every_request_of_a_chunk_comes_back_in_order(self, count: int) -> None:
        requests = self.goods(count)
        decoded = decode(self.make(), requests)
        assert not decoded.rejects
        found = per_request(decoded)
        assert len(found) == count
        assert all(same(found[i], request.inputs) for i, request in enumerate(requests))

    def test_columns_are_contiguous_and_in_the_order_of_the_signature(self) -> None:
        for group in decode(self.make(), self.goods(70)).groups:
            assert list(group.columns) == [spec.name for spec in self.signature.inputs]
            for spec in self.signature.inputs:
                column = group.columns[spec.name]
                assert column.flags.c_contiguous
                assert column.dtype == spec.dtype

    def test_a_lane_is_a_group_and_tells_the_trailing_shapes(self) -> None:
        groups = decode(self.make(), self.goods(130)).groups
        lanes = [group.lane for group in groups]
        assert lanes == [tuple(column.shape[1:] for column in group.columns.values()) for group in groups]
        assert len(set(lanes)) == len(lanes)

    def test_one_by_one_and_all_at_once_agree(self) -> None:
        requests = self.goods(100)
        the = self.make()
        whole = per_request(decode(the, requests))
        for i, request in enumerate(requests):
            assert same(per_request(decode(the, [request]))[0], whole[i])

    def test_the_quick_way_takes_what_is_usual(self) -> None:
        requests = self.usual()
        the = cast("ChunkDecoder", self.make())
        shares = list(the.at_once([r.body for r in requests], [r.headers for r in requests]))
        assert sum(len(share.rows) for share in shares) == len(requests)

    def usual(self) -> list[Request]:
        """Requests that the quick way must take."""
        return self.goods(64)

    def test_a_bad_message_harms_only_itself(self) -> None:
        the = self.make()
        for name, body, headers in self.bad():
            requests = self.goods(9)
            decoded = decode(the, [*requests[:4], Request(body, {}, headers), *requests[4:]])
            assert [position for position, _ in decoded.rejects] == [4], name
            found = per_request(decoded)
            for i, request in zip([0, 1, 2, 3, 5, 6, 7, 8, 9], requests, strict=True):
                assert same(found[i], request.inputs), name

    def test_bad_messages_everywhere_leave_the_good_ones_whole(self) -> None:
        bad = [Request(body, {}, headers) for _, body, headers in self.bad()]
        requests = [each for pair in zip(self.goods(len(bad)), bad, strict=True) for each in pair]
        decoded = decode(self.make(), requests)
        assert [position for position, _ in decoded.rejects] == list(range(1, 2 * len(bad), 2))
        found = per_request(decoded)
        assert all(same(found[i], request.inputs) for i, request in enumerate(requests) if i % 2 == 0)

    def test_a_refusal_is_one_short_printable_line(self) -> None:
        the = self.make()
        for name, body, headers in self.bad():
            text = refusal(the, body, headers)
            assert 0 < len(text) <= 300, name
            assert text.isprintable(), name

    @given(body=st.binary(max_size=200) | anything.map(orjson.dumps))
    @QUICK
    def test_garbage_is_refused_or_read_but_never_raises(self, body: bytes) -> None:
        self.each_position_once([Request(body, {})])

    def each_position_once(self, strange: Sequence[Request]) -> None:
        """Strange messages between good ones: each is in one place, read alike in company, alone and exactly."""
        the = self.make()
        first, last = self.goods(2)
        decoded = decode(the, [first, *strange, last])
        found = per_request(decoded)
        rejected = dict(decoded.rejects)
        assert found.keys() | rejected.keys() == set(range(len(strange) + 2))
        assert not found.keys() & rejected.keys()
        assert same(found[0], first.inputs)
        assert same(found[len(strange) + 1], last.inputs)
        for i, request in enumerate(strange, 1):
            for other in (the, self.exact_only()):
                alone = decode(other, [request])
                assert bool(alone.rejects) == (i in rejected)
                if i in rejected:
                    assert str(alone.rejects[0][1]) == str(rejected[i])
                else:
                    assert same(per_request(alone)[0], found[i])
                    assert list(alone.groups[0].asks) == [
                        ask for g in decoded.groups for p, ask in zip(g.positions, g.asks, strict=True) if p == i
                    ]

    def exact_only(self) -> Codec:
        """A codec that reads every message the exact way."""
        the = self.make()

        def at_once(bodies: Sequence[bytes], headers: Sequence[Headers]) -> list[Share]:
            raise LookupError(f"{len(bodies)} bodies, {len(headers)} headers")

        vars(the)["at_once"] = at_once
        return the

    def test_the_exact_way_takes_what_is_usual_too(self) -> None:
        requests = self.usual()
        assert decode(self.exact_only(), requests).rejects == []
        found = per_request(decode(self.exact_only(), requests))
        assert all(same(found[i], request.inputs) for i, request in enumerate(requests))

    @pytest.mark.parametrize("count", [1, 5, 70])
    def test_every_answer_carries_its_own_id_and_rows(self, count: int) -> None:
        the = self.make()
        rng = np.random.default_rng(count)
        for group in decode(the, self.goods(count)).groups:
            outputs = outputs_for(self.signature.outputs, sum(group.rows), rng)
            ids = [f'{serial}",{{"\n\\ü%b{"x" * serial}' for serial in range(len(group.rows))]
            bodies, headers = the.encode(outputs, group.rows, [None] * len(ids), ids)
            assert len(bodies) == len(headers) == len(ids)
            start = 0
            for body, head, rows, id_ in zip(bodies, headers, group.rows, ids, strict=True):
                answer = self.read(body, head)
                assert tuple(head) == (("content-type", b"application/json"),)
                assert answer.id == id_
                assert same(answer.outputs, {n: o[start : start + rows] for n, o in outputs.items()})
                start += rows

    def test_answers_do_not_depend_on_their_company(self) -> None:
        the = self.make()
        group = decode(the, self.goods(5)).groups[0]
        outputs = outputs_for(self.signature.outputs, sum(group.rows), np.random.default_rng(0))
        ids = [str(i) for i in range(len(group.rows))]
        together = the.encode(outputs, group.rows, group.asks, ids)[0]
        start = 0
        for i, rows in enumerate(group.rows):
            own = {name: output[start : start + rows] for name, output in outputs.items()}
            assert the.encode(own, [rows], [group.asks[i]], [ids[i]])[0] == [together[i]]
            start += rows


def tensor(name: str, datatype: str, array: Array, **more: Any) -> dict[str, Any]:
    """An input of a V2 request."""
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.ravel().tolist()} | more
