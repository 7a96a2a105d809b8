"""Jobs as a source, under every promise a file can keep: lines and tables, on this machine and in a bucket."""

from __future__ import annotations

import base64
import gzip
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inferbus.connectors.base import (
    Bell,
    Headers,
    Message,
    Misconfigured,
    Sink,
    Source,
    Unavailable,
    Unreadable,
)
from inferbus.connectors.file import Files, Folder
from inferbus.connectors.job import Found, JobSource
from inferbus.connectors.request_rows import (
    CHUNK_BYTES,
    PIECE,
    SUFFIXES,
    Chunk,
    Format,
    JsonLines,
    Known,
    Parquet,
    TableRows,
)
from inferbus.connectors.s3_files import RANGE, Objects
from tests.connector_contract import PATIENCE, ConnectorContract, Place, Seen, no_drain, opened, receive, settle
from tests.servers import S3, Toxiproxy


def always() -> bool:
    return True


class JobPlace(Place):
    """Requests in files, and a progress file for each group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def sink(self) -> Sink:
        raise NotImplementedError("a store takes records by the object: see tests/test_objects.py")

    def seen(self) -> list[Seen]:
        raise NotImplementedError

    def kill(self, source: Source) -> None:
        """Nothing is saved: what was not saved was not done."""
        assert isinstance(source, JobSource)
        source._close_rows()
        source._place.close()
        source._give_lock()


class FilePlace(JobPlace):
    """Lines added to one file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "in.jsonl").touch()

    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        assert not headers, "a line has no headers"
        del key
        with (self.folder / "in.jsonl").open("ab") as file:
            file.write(body + b"\n")

    def source(self, group: str = "g") -> JobSource:
        return JobSource(Files(self.folder / "in.jsonl"), JsonLines(), self.folder / group)


class JobContract(ConnectorContract):
    """A row is a body and little else, so some promises look different."""

    def test_ids_are_stable_across_deliveries_and_given_ids_win(self, place: Place) -> None:
        place.publish(b"plain")
        ids = []
        for _ in range(2):
            source = place.source()
            source.open(Bell(), no_drain)
            ids += [m.id for m in receive(source, 1)]
            place.kill(source)
        assert ids[0] == ids[1]
        assert ids[0].endswith("jsonl-0")

    def test_keys_bodies_and_headers_come_byte_for_byte(self, place: Place) -> None:
        body = bytes(byte for byte in range(256) if byte not in b"\n") + b"x"
        place.publish(b"x" + body)
        with opened(place.source()) as source:
            (message,) = receive(source, 1)
        assert (message.body, message.key, message.headers, message.attempts) == (b"x" + body, None, (), 1)

    def test_a_write_is_durable_when_it_is_done_and_nothing_is_changed(self, place: Place) -> None:
        assert isinstance(place, JobPlace)
        folder, bell, done = Folder(place.folder / "out"), Bell(), []
        folder.open(bell)
        folder.put("a/b", lambda: bytes(range(256)), lambda: done.append(1), always)
        until = time.monotonic() + 10.0
        while not done and time.monotonic() < until:
            bell.wait(0.1)
            folder.tick()
        assert (place.folder / "out/a/b").read_bytes() == bytes(range(256))
        folder.close(1.0)

    def test_opening_and_closing_twice_is_harmless(self, place: Place) -> None:
        assert isinstance(place, JobPlace)
        place.publish(b"one")
        source, folder = place.source(), Folder(place.folder / "out")
        source.open(Bell(), no_drain)
        for _ in range(2):
            source.close()
            folder.close(0.1)
        with opened(place.source()) as again:
            assert [m.body for m in receive(again, 1)] == [b"one"]


class TestFiles(JobContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return FilePlace(tmp_path)


class ListedContract(JobContract):
    """What is listed once: nothing comes to it while it is read."""

    def test_the_limit_is_kept_and_an_empty_bus_answers_at_once(self, place: Place) -> None:
        for i in range(5):
            place.publish(b"%d" % i)
        with opened(place.source()) as source:
            chunks: list[list[Message]] = []
            until = time.monotonic() + PATIENCE
            while not source.ended() and time.monotonic() < until:
                chunks.append(source.receive(2))
                time.sleep(0.002)
            assert source.receive(10) == []
        assert max(map(len, chunks)) <= 2
        assert sum(map(len, chunks)) == 5

    def test_the_bus_is_exhausted_only_when_nothing_is_left_for_anyone(self, place: Place) -> None:
        place.publish(b"one")
        with opened(place.source()) as source:
            assert not source.exhausted()
            settle(source, receive(source, 1))
            assert source.exhausted()


class TablesContract(ListedContract):
    """Rows of Parquet: they have ids, keys and headers, and their bodies are made of columns."""

    def test_ids_are_stable_across_deliveries_and_given_ids_win(self, place: Place) -> None:
        ConnectorContract.test_ids_are_stable_across_deliveries_and_given_ids_win(self, place)

    def test_keys_bodies_and_headers_come_byte_for_byte(self, place: Place) -> None:
        headers = (("a", b"1"), ("a", b"2"), ("raw", bytes(range(256))), ("empty", b""))
        place.publish(b"text", key=b"\x00\xffkey", headers=headers)
        with opened(place.source()) as source:
            (message,) = receive(source, 1)
        assert (message.body, message.key, message.headers, message.attempts) == (
            b"text",
            b"\x00\xffkey",
            headers,
            1,
        )


class Bare(Parquet):
    """A table of one column whose bodies are told without the object around it, for tests that know of no columns."""

    def rows(self, where: str, file: BinaryIO, size: int, row: int, known: Known) -> BareRows:  # type: ignore[override]
        return BareRows(super().rows(where, file, size, row, known))


class BareRows:
    def __init__(self, rows: TableRows) -> None:
        self._rows = rows
        self.close = rows.close

    @property
    def left(self) -> int | None:
        return self._rows.left

    def read(self, limit: int) -> Chunk:
        chunk = self._rows.read(limit)
        return replace(chunk, bodies=[body[len(b'{"x":"') : -len(b'"}')] for body in chunk.bodies])


def table(body: bytes, key: bytes | None, headers: Headers) -> bytes:
    """A Parquet file of one row."""
    string = pa.string()
    told = [
        {"name": name, "value": base64.b64encode(value).decode(), "value_encoding": "base64"} for name, value in headers
    ]
    header = pa.list_(pa.struct([("name", string), ("value", string), ("value_encoding", string)]))
    out = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"x": [body.decode()], "key": pa.array([key], pa.binary()), "headers": pa.array([told], header)}), out
    )
    return out.getvalue().to_pybytes()  # type: ignore[no-any-return]


class TableFilesPlace(JobPlace):
    """A file for each request."""

    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        folder = self.folder / "in"
        folder.mkdir(exist_ok=True)
        (folder / f"{len(list(folder.iterdir())):03}.parquet").write_bytes(table(body, key, headers))

    def source(self, group: str = "g") -> JobSource:
        return JobSource(Files(self.folder / "in"), Bare(), self.folder / group)


class TestTableFiles(TablesContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return TableFilesPlace(tmp_path)


class BucketPlace(JobPlace):
    """An object for each request."""

    def __init__(self, folder: Path, s3: S3, form: Format) -> None:
        super().__init__(folder)
        self._s3 = s3
        self._form = form
        self.bucket = s3.bucket()
        self._count = 0

    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        content = table(body, key, headers) if isinstance(self._form, Parquet) else body + b"\n"
        self.put(f"in/{self._count:03}{SUFFIXES[self._form.name][0]}", content)
        self._count += 1

    def put(self, key: str, content: bytes) -> None:
        self._s3.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def source(self, group: str = "g") -> JobSource:
        return self.reading("in/", group)

    def reading(self, prefix: str, group: str = "g") -> JobSource:
        objects = Objects(self.bucket, prefix, region=self._s3.region, endpoint_url=self._s3.url)
        return JobSource(objects, self._form, self.folder / group)


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3.credentials[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3.credentials[1])


@pytest.mark.broker
@pytest.mark.usefixtures("credentials")
class TestObjects(ListedContract):
    @pytest.fixture
    def place(self, tmp_path: Path, s3: S3) -> Place:
        return BucketPlace(tmp_path, s3, JsonLines())


@pytest.mark.broker
@pytest.mark.usefixtures("credentials")
class TestTableObjects(TablesContract):
    @pytest.fixture
    def place(self, tmp_path: Path, s3: S3) -> Place:
        return BucketPlace(tmp_path, s3, Bare())


# Folders


def begun(path: Path, form: Format, progress: Path) -> JobSource:
    source = JobSource(Files(path), form, progress)
    source.open(Bell(), no_drain)
    return source


def rest(source: JobSource, limit: int = 3) -> list[Message]:
    """All that is left."""
    messages: list[Message] = []
    until = time.monotonic() + PATIENCE
    while not source.ended():
        assert time.monotonic() < until
        try:
            messages += source.receive(limit)
        except Unavailable:
            time.sleep(0.01)
    return messages


def test_folders_inside_are_read_too_and_what_is_hidden_is_not(tmp_path: Path) -> None:
    for name in ("year=2026/a.jsonl", "year=2025/a.jsonl", "_temporary/b.jsonl", ".c.jsonl", "_SUCCESS", "d.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode() + b"\n")
    with closing(begun(tmp_path / "in", JsonLines(), tmp_path / "p")) as source:
        messages = rest(source)
        assert [m.id for m in messages] == ["year=2025/a.jsonl-0", "year=2026/a.jsonl-0"]
        assert source.locate(messages[1]) == "file:in/year=2026/a.jsonl/1"
        assert source.run(messages[:1]) == ("year=2025/a-jsonl/000000000000", messages[:1])


def test_gzipped_lines_are_read_and_taken_up_where_they_were_left(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b"%d\n" % i for i in range(6))) + gzip.compress(b"6\n\n7")
    (tmp_path / "in.jsonl.gz").write_bytes(packed)
    source = begun(tmp_path / "in.jsonl.gz", JsonLines(), tmp_path / "p")
    source.settle(source.receive(3) + source.receive(2))
    source.close()
    with closing(begun(tmp_path / "in.jsonl.gz", JsonLines(), tmp_path / "p")) as source:
        messages = rest(source)
        assert [(m.id, m.body) for m in messages] == [
            ("in.jsonl.gz-5", b"5"),
            ("in.jsonl.gz-6", b"6"),
            ("in.jsonl.gz-8", b"7"),
        ]
        source.settle(messages)
    with closing(begun(tmp_path / "in.jsonl.gz", JsonLines(), tmp_path / "p")) as source:
        assert source.ended()
        assert source.lag() == 0


def test_a_gzipped_file_that_is_cut_off_ends_the_job_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b"1\n" * 1000)[:-9])
    with (
        closing(begun(tmp_path / "in.jsonl.gz", JsonLines(), tmp_path / "p")) as source,
        pytest.raises(Misconfigured, match=r"^file:in.jsonl.gz: is not whole as gzip, from about row 1 on$"),
    ):
        rest(source, 10_000)


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_a_line_over_the_limit_is_one_error_and_is_never_held(tmp_path: Path, name: str) -> None:
    long, most = b"x" * (20 * CHUNK_BYTES // 10 + 1), PIECE + 100
    bodies = [b"1", long, b"y" * most, b"z" * (most + 3), b"", b"2", long]
    content = b"\r\n".join(bodies)
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    expected = [(i, body if len(body) <= most else b"") for i, body in enumerate(bodies) if body]
    for begin in range(len(bodies)):  # from each row on, as after a crash
        with closing(begun(tmp_path / name, JsonLines(most), tmp_path / f"p{begin}")) as source:
            messages = rest(source, 2)
        assert [(int(m.id.rpartition("-")[2]), m.body) for m in messages] == [e for e in expected if e[0] >= begin]
        long_ones = [m for m in messages if isinstance(m, Unreadable)]
        assert {m.code for m in long_ones} <= {"too_large"}
        assert [m.body for m in long_ones] == [b"" for i, body in expected if not body and i >= begin]
        with closing(begun(tmp_path / name, JsonLines(most), tmp_path / f"p{begin + 1}")) as source:
            source.settle([m for m in rest(source, 2) if int(m.id.rpartition("-")[2]) <= begin])


def test_rows_that_were_done_are_passed_over_in_steps(tmp_path: Path) -> None:
    packed = gzip.compress(b"%s\n" % (b"x" * 1000) * 30_000 + b"last\n", 1)
    (tmp_path / "in.jsonl.gz").write_bytes(packed)
    source = begun(tmp_path / "in.jsonl.gz", JsonLines(), tmp_path / "p")
    source.settle(rest(source, 1024)[:-1])
    source.close()
    with closing(begun(tmp_path / "in.jsonl.gz", JsonLines(), tmp_path / "p")) as source:
        assert source.receive(1024) == []
        assert not source.ended()
        assert [m.body for m in rest(source, 1024)] == [b"last"]


def test_whether_a_file_grows_is_its_formats_to_say(tmp_path: Path) -> None:
    (tmp_path / "t.pq").write_bytes(table(b"a", None, ()))
    with closing(begun(tmp_path / "t.pq", Parquet(), tmp_path / "p")) as source:
        source.settle(source.receive(1))
    (tmp_path / "t.pq").write_bytes(table(b"b", None, ()))
    with pytest.raises(Misconfigured, match=r"t.pq: has changed since"):
        begun(tmp_path / "t.pq", Parquet(), tmp_path / "p")


@pytest.mark.parametrize(
    ("form", "name", "why"),
    [
        (JsonLines(), "in/a.parquet", r"no file there ends in .jsonl, .*; 1 are for `format: parquet`: set that"),
        (Parquet(), "in/a.jsonl", r"no file there ends in .parquet; 1 are for `format: jsonl`: set that"),
    ],
)
def test_files_of_the_other_format_are_told_of(tmp_path: Path, form: Format, name: str, why: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / name).touch()
    for path in (tmp_path / "in", tmp_path / name):
        with pytest.raises(Misconfigured, match=why):
            begun(path, form, tmp_path / "p")


def test_a_packed_file_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b"1\n2\n"))
    source = begun(path, JsonLines(), tmp_path / "p")
    source.settle(source.receive(1))
    source.close()
    path.write_bytes(gzip.compress(b"another\n2\n"))
    with pytest.raises(Misconfigured, match=r"has changed since .*/p was written; delete that to begin anew"):
        begun(path, JsonLines(), tmp_path / "p")


# Buckets


@pytest.fixture
def bucket(tmp_path: Path, s3: S3, credentials: None) -> BucketPlace:
    del credentials
    return BucketPlace(tmp_path, s3, JsonLines())


def until(happened: Callable[[], bool]) -> None:
    last = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < last, "it did not come to that"
        time.sleep(0.005)


@pytest.mark.broker
def test_objects_are_read_in_the_order_of_keys_without_marks_and_by_one_key_alone(bucket: BucketPlace) -> None:
    for key in ("in/b.jsonl", "in/a/x.jsonl", "in/_inferbus", "in/.tmp/y.jsonl", "in/", "inner.jsonl", "other.jsonl"):
        bucket.put(key, b"" if key.endswith(("_inferbus", "/")) else key.encode() + b"\n")
    for prefix, keys in {
        "in/": ["in/a/x.jsonl", "in/b.jsonl"],
        "in": ["in/a/x.jsonl", "in/b.jsonl", "inner.jsonl"],
        "in/b.jsonl": ["in/b.jsonl"],
    }.items():
        with opened(bucket.reading(prefix, prefix.replace("/", "-"))) as source:
            assert isinstance(source, JobSource)
            messages = rest(source)
            assert [m.body.decode() for m in messages] == keys
            assert [source.locate(m) for m in messages] == [f"s3:{bucket.bucket}/{key}/1" for key in keys]
            assert all(source.locate(m).startswith(source.name) for m in messages)


@pytest.mark.broker
def test_a_large_object_comes_in_ranges_and_from_where_the_last_run_was(bucket: BucketPlace) -> None:
    lines = [b"%09d" % i + b"x" * 990 for i in range(3 * RANGE // 1000)]
    bucket.put("in/large.jsonl", b"\n".join(lines))
    source = bucket.source()
    source.open(Bell(), no_drain)
    messages = receive(source, 20_000, 1000)
    assert [m.body for m in messages] == lines[:20_000]
    source.settle(messages)
    source.close()
    with opened(bucket.source()) as again:
        assert isinstance(again, JobSource)
        assert [m.body for m in rest(again, 1000)] == lines[20_000:]


@pytest.mark.broker
def test_an_object_that_changed_between_two_runs_is_refused(bucket: BucketPlace) -> None:
    bucket.put("in/a.jsonl", b"1\n2\n")
    source = bucket.source()
    source.open(Bell(), no_drain)
    source.settle(receive(source, 1))
    source.close()
    bucket.put("in/a.jsonl", b"3\n4\n")
    why = rf"^s3:{bucket.bucket}/in/a.jsonl: has changed since .*/g was written; delete that to begin anew$"
    with pytest.raises(Misconfigured, match=why):
        bucket.source().open(Bell(), no_drain)


@pytest.mark.broker
def test_an_object_that_changes_while_the_job_runs_ends_it(bucket: BucketPlace) -> None:
    bucket.put("in/a.jsonl", b"1\n2\n")
    with opened(bucket.source()) as source:
        bucket.put("in/a.jsonl", b"3\n4\n")
        with pytest.raises(
            Misconfigured, match=r"a.jsonl: has changed, or is gone, since the job began; begin it anew$"
        ):
            until(lambda: bool(source.receive(1)))


@pytest.mark.broker
def test_a_bucket_or_a_prefix_with_nothing_says_so(bucket: BucketPlace, s3: S3) -> None:
    with pytest.raises(Misconfigured, match=rf"^s3:{bucket.bucket}/in/: no file there ends in .jsonl, "):
        bucket.source().open(Bell(), no_drain)
    gone = Objects("no-such-one", region=s3.region, endpoint_url=s3.url)
    with pytest.raises(Unavailable, match=r'^s3: bucket "no-such-one" does not exist; correct the name$'):
        gone.open(Bell())
    with pytest.raises(Unavailable, match=r'^s3: bucket "abc": no answer from 127.0.0.1:9 \(\w+\)$'):
        Objects("abc", region="us-east-1", endpoint_url="http://127.0.0.1:9").open(Bell())


@pytest.mark.broker
def test_a_bucket_that_is_away_for_a_while_costs_nothing_but_time(
    bucket: BucketPlace, s3: S3, toxiproxy: Toxiproxy
) -> None:
    for name in "abc":
        bucket.put(f"in/{name}.jsonl", name.encode() + b"\n")
    proxy = toxiproxy.before(s3.url.rpartition("/")[2])
    objects = Objects(bucket.bucket, "in/", region=s3.region, endpoint_url=f"http://{proxy.address}")
    source = JobSource(objects, JsonLines(), bucket.folder / "g")
    with opened(source):
        with proxy.cut():
            assert source.receive(1) == []
            until(lambda: source.healthy() is not None)
            assert f'bucket "{bucket.bucket}": no answer from {proxy.address}' in (source.healthy() or "")
            with pytest.raises(Unavailable, match="no answer from"):
                source.receive(1)
            assert not source.ended()
        assert [m.body for m in rest(source)] == [b"a", b"b", b"c"]
        assert source.healthy() is None


class Folded(Files):
    """As a bucket lists keys, of which a path would make one."""

    def open(self, bell: Bell) -> list[Found]:
        del bell
        return [Found("a//b.jsonl", 1, "1"), Found("a/b.jsonl", 1, "1")]


def test_an_object_with_an_empty_part_in_its_name_is_refused(tmp_path: Path) -> None:
    source = JobSource(Folded(tmp_path / "in"), JsonLines(), tmp_path / "p")
    with pytest.raises(Misconfigured, match=r"^file:in: \"a//b.jsonl\" has an empty part; expected a name without$"):
        source.open(Bell(), no_drain)


@pytest.mark.broker
def test_what_the_user_named_is_not_hidden(bucket: BucketPlace) -> None:
    for key in ("_in/_a.jsonl", "_in/_b/c.jsonl", "_in/d.jsonl"):
        bucket.put(key, key.encode())
    for prefix, keys in {"_i": ["_in/d.jsonl"], "_in/_a": ["_in/_a.jsonl"], "_in/_b": ["_in/_b/c.jsonl"]}.items():
        with opened(bucket.reading(prefix, prefix.replace("/", "-"))) as source:
            assert isinstance(source, JobSource)
            assert [m.body.decode() for m in rest(source)] == keys


@pytest.mark.broker
def test_an_object_that_a_full_disk_cuts_short_is_written_again(
    bucket: BucketPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("in/a.jsonl", b"1\n2\n3\n")
    with opened(bucket.source()) as source, monkeypatch.context() as full:
        write = os.pwrite
        full.setattr("os.pwrite", lambda file, content, at: write(file, content[:3], at))
        assert source.receive(1) == []
        until(lambda: source.healthy() is not None)
        assert str(source.healthy()).endswith(": cannot be written: No space left on device")
        full.undo()
        assert isinstance(source, JobSource)
        assert [m.body for m in rest(source)] == [b"1", b"2", b"3"]


@pytest.mark.broker
def test_objects_wait_until_there_is_room_for_them(bucket: BucketPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("in/a.jsonl", b"1\n")
    with opened(bucket.source()) as source, monkeypatch.context() as full:
        full.setattr("tempfile.tempdir", str(bucket.folder / "nowhere"))
        assert source.receive(1) == []
        until(lambda: source.healthy() is not None)
        assert source.healthy() == f"{bucket.folder}/nowhere: cannot be written: No such file or directory"
        full.undo()
        assert isinstance(source, JobSource)
        assert [m.body for m in rest(source)] == [b"1"]
