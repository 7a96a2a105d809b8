"""Files as a source of bounded jobs, folders as stores, and whole jobs of both."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inferbus.connectors.base import Bell, Fatal, Message, Misconfigured, Unavailable
from inferbus.connectors.file import Files, Folder
from inferbus.connectors.job import JobSource
from inferbus.connectors.request_rows import JsonLines
from inferbus.worker.cli import main
from inferbus.worker.supervisor import COMMAND
from tests import tiny_models
from tests.connector_contract import no_drain

SOAK = "INFERBUS_SOAK" in os.environ


def always() -> bool:
    return True


def lines(path: Path, *bodies: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(body + b"\n" for body in bodies))
    return path


def begun(path: Path, progress: Path) -> JobSource:
    source = JobSource(Files(path), JsonLines(), progress)
    source.open(Bell(), no_drain)
    return source


def rest(source: JobSource) -> list[Message]:
    """All that is left."""
    messages: list[Message] = []
    while not source.ended():
        messages += source.receive(3)
    return messages


def save(source: JobSource, messages: list[Message]) -> None:
    """Settle, and wait until it is saved."""
    source.settle(messages)
    until = time.monotonic() + 10.0
    before = source.inflight()[0]
    while source.inflight()[0] == before and time.monotonic() < until:
        source.tick(time.monotonic())
        time.sleep(0.001)


def test_each_line_is_a_request_named_by_its_place_and_blank_ones_are_none(tmp_path: Path) -> None:
    source = begun(lines(tmp_path / "a.jsonl", b"one", b"", b"  two \r"), tmp_path / "p")
    messages = rest(source)
    assert [(m.id, m.body, m.key, m.headers) for m in messages] == [
        ("a.jsonl-0", b"one", None, ()),
        ("a.jsonl-2", b"two", None, ()),
    ]
    assert source.locate(messages[1]) == "file:a.jsonl/3"
    assert source.inflight() == (2, 6)
    assert source.exhausted()
    source.close()


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    lines(folder / "b.jsonl", b"3")
    lines(folder / "a.jsonl", b"1", b"2")
    lines(folder / "notes.txt", b"no")
    source = begun(folder, tmp_path / "p")
    assert [m.body for m in rest(source)] == [b"1", b"2", b"3"]
    source.close()


def test_the_next_run_begins_where_this_one_was_settled(tmp_path: Path) -> None:
    path, progress = lines(tmp_path / "a.jsonl", *(b"%d" % i for i in range(10))), tmp_path / "p"
    source = begun(path, progress)
    messages = rest(source)
    save(source, messages[:4] + messages[5:7])
    assert source.inflight()[0] == 10 - 3  # chunks of three are freed whole
    with pytest.raises(Unavailable, match=r"p: another worker is at this job; let it end$"):
        begun(path, progress)
    source._close_rows()  # as in a crash: nothing is saved that was not
    source._give_lock()
    source = begun(path, progress)
    again = rest(source)
    assert [m.body for m in again] == [b"%d" % i for i in range(4, 10)]
    assert [m.id for m in again] == [m.id for m in messages[4:]]
    source.settle(again)
    source.close()
    with closing(begun(path, progress)) as source:
        assert rest(source) == []


def test_lines_that_are_added_later_are_served_by_the_next_run(tmp_path: Path) -> None:
    path, progress = lines(tmp_path / "a.jsonl", b"1"), tmp_path / "p"
    source = begun(path, progress)
    source.settle(rest(source))
    source.close()
    lines(path, b"1", b"2")
    with closing(begun(path, progress)) as source:
        assert [m.id for m in rest(source)] == ["a.jsonl-1"]


def test_how_much_is_left_is_told_in_lines(tmp_path: Path) -> None:
    source = begun(lines(tmp_path / "a.jsonl", *[b"12345"] * 100), tmp_path / "p")
    assert source.lag() is None
    source.receive(40)
    assert source.lag() == 60
    source.close()


def saved(folder: Path, name: str) -> Path:
    rows = {"in": [3, 3, 99, None]}
    (folder / "p").write_bytes(orjson.dumps({"place": str(folder / name), "rows": rows}))
    return folder / "p"


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda _: None, "there is no such file"),
        (
            lambda folder: (folder / "in").mkdir(),
            r"file:in: no file there ends in .jsonl, .ndjson, .jsonl.gz, .ndjson.gz$",
        ),
        (lambda folder: (lines(folder / "in"), (folder / "p").write_text("{}")), "cannot be read as the progress"),
        (
            lambda folder: (lines(folder / "in"), saved(folder, "in")),
            "is shorter than .*/p says was read of it; delete that to begin anew",
        ),
        (
            lambda folder: (lines(folder / "in"), saved(folder, "other/in")),
            "p: is the progress of .*/other/in, not of .*/in; name another `progress`$",
        ),
        (lambda folder: lines(folder / "in" / os.fsdecode(b"\xff.jsonl")), r"^file:in: '.udcff.jsonl' is not UTF-8"),
    ],
)
def test_a_job_that_cannot_begin_says_why(tmp_path: Path, prepare: Callable[[Path], Any], why: str) -> None:
    prepare(tmp_path)
    with pytest.raises(Misconfigured, match=why):
        begun(tmp_path / "in", tmp_path / "p")


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    lines(tmp_path / "taken")
    with pytest.raises(Unavailable, match="taken/out: cannot be written: Not a directory"):
        Folder(tmp_path / "taken/out").open(Bell())


def test_an_object_replaces_what_had_its_name_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out")
    bell = Bell()
    folder.open(bell)
    done: list[str] = []
    for content in (b"old", b"new"):
        folder.put("a/b.jsonl", lambda content=content: content, lambda: done.append("x"), always)  # type: ignore[misc]
    until = time.monotonic() + 10.0
    while len(done) < 2 and time.monotonic() < until:
        bell.wait(0.1)
        folder.tick()
    folder.close(1.0)
    assert [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()] == [b"new"]


@pytest.mark.parametrize("name", ["../a.jsonl", "/srv/a.jsonl", "a/../../b.jsonl"])
def test_an_object_lies_in_the_folder_or_nowhere(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path / "out")
    folder.open(Bell())
    with pytest.raises(Fatal, match="would lie elsewhere"):
        folder.put(name, lambda: b"", lambda: None, always)
    folder.close(1.0)


def test_an_object_that_cannot_be_made_ends_the_run_and_not_the_thread(tmp_path: Path) -> None:
    folder, bell = Folder(tmp_path / "out"), Bell()
    done: list[str] = []
    folder.open(bell)
    folder.put("a", lambda: bytes(1 // len(done)), lambda: None, always)
    folder.put("b", lambda: b"b", lambda: done.append("b"), always)
    with pytest.raises(Fatal, match=r"an object cannot be written: ZeroDivisionError"):
        await_object(folder, bell, done)
    await_object(folder, bell, done)
    folder.close(1.0)


def await_object(folder: Folder, bell: Bell, done: list[str]) -> None:
    last = time.monotonic() + 10.0
    while not done:
        assert time.monotonic() < last, "it did not come to that"
        bell.wait(0.01)
        folder.tick()


@pytest.mark.parametrize(
    ("progress", "why"),
    [
        ("nowhere/p", "nowhere/p: cannot be written: No such file or directory$"),
        ("folder", "folder: cannot be read: Is a directory$"),
    ],
)
def test_a_progress_file_that_cannot_be_had_is_told_before_a_row_goes_out(
    tmp_path: Path, progress: str, why: str
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(Unavailable, match=why):
        begun(lines(tmp_path / "in.jsonl", b"1"), tmp_path / progress)


# Whole jobs


class Job:
    """A pipeline of files and a model that doubles."""

    def __init__(self, folder: Path, sink: str = "{file: {path: out, max_rows: 500}}") -> None:
        self.folder = folder
        tiny_models.python_model(folder)
        (folder / "job.yaml").write_text(
            f"name: job\nmodel: model.py\nsource: {{file: {{path: in.jsonl}}}}\nsink: {sink}\nhttp: null\n"
        )

    def requests(self, count: int, *odd: bytes, into: str = "in.jsonl") -> None:
        bodies = [
            orjson.dumps({"id": str(i), "inputs": [
                {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [i + 0.25, 0.5, 0]}]})
            for i in range(count)
        ]  # fmt: skip
        lines(self.folder / into, *bodies, *odd)

    def start(self, *flags: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - our own command
            [*COMMAND, "run", "job.yaml", *flags], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finish(self, *flags: str) -> str:
        job = self.start(*flags)
        said = job.communicate(timeout=120)[0].decode()
        assert job.returncode == 0, said
        return said

    def rows(self, folder: str) -> Iterator[dict[str, Any]]:
        for path in sorted((self.folder / folder).rglob("*")):
            if path.suffix == ".parquet":
                yield from pq.read_table(path).to_pylist()
            elif path.is_file():
                yield from map(orjson.loads, path.read_bytes().splitlines())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_job_ends_by_itself_with_every_line_accounted_for(job: Job) -> None:
    job.requests(2000, b"oops", b'{"inputs": []}')
    job.finish()
    assert [row["id"] for row in job.rows("out")] == [f"in.jsonl-{i}" for i in range(2000)]
    assert [row["y"] for row in job.rows("out")] == [[2.0 * i + 0.5, 1.0, 0.0] for i in range(2000)]
    errors = {row["id"]: (row["error"]["code"], row["body"]) for row in job.rows("job.errors")}
    assert errors == {
        "in.jsonl-2000": ("invalid_request", "oops"),
        "in.jsonl-2001": ("invalid_request", '{"inputs": []}'),
    }


def test_parquet_files_hold_the_same_rows(job: Job) -> None:
    job.requests(1000)
    job.finish("--set", "sink.file.format=parquet")
    assert {path.suffix for path in (job.folder / "out").rglob("*") if path.is_file()} == {".parquet"}
    assert [row["y"] for row in job.rows("out")] == [[2.0 * i + 0.5, 1.0, 0.0] for i in range(1000)]


def test_a_job_that_is_killed_again_and_again_loses_and_doubles_no_row(job: Job) -> None:
    count, kills = (200_000, 30) if SOAK else (40_000, 6)
    job.requests(count)
    rows = (job.folder / "in.jsonl").read_bytes().splitlines()
    rare = range(0, count, 997)  # there are stretches without
    for row in rare:
        rows[row] = b"oops"
    lines(job.folder / "in.jsonl", *rows)
    progress = job.folder / "in.jsonl.job.progress"
    done = 0
    while done < kills:
        before = progress.read_bytes() if progress.exists() else b""
        worker = job.start("--set", "flow.max_inflight=2000")
        until = time.monotonic() + 60
        while not progress.exists() or progress.read_bytes() == before:  # a life that did nothing proves nothing
            assert worker.poll() is None, "it ended before it could be killed: give it more lines"
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))  # noqa: S311 - anywhere between two savings
        worker.kill()
        worker.communicate()
        done += 1
    job.finish()
    failed = Counter(row["id"] for row in job.rows("job.errors"))
    assert failed == Counter(f"in.jsonl-{i}" for i in rare)
    served = Counter(row["id"] for row in job.rows("out"))
    assert served + failed == Counter(f"in.jsonl-{i}" for i in range(count))


def test_files_that_differ_in_their_suffix_alone_have_objects_of_their_own(job: Job) -> None:
    (job.folder / "in.jsonl").mkdir()
    for name in ("a.jsonl", "a.ndjson"):
        job.requests(50, into=f"in.jsonl/{name}")
    job.finish()
    rows = Counter(row["id"] for row in job.rows("out"))
    assert rows == Counter(f"{name}-{i}" for name in ("a.jsonl", "a.ndjson") for i in range(50))


def test_a_job_with_many_failing_requests_is_not_slowed_by_them(job: Job) -> None:
    job.requests(3000, *[b"oops", orjson.dumps({"inputs": []})] * 1500)
    shuffled = (job.folder / "in.jsonl").read_bytes().splitlines()
    random.shuffle(shuffled)
    lines(job.folder / "in.jsonl", *shuffled)
    job.finish("--set", "sink.file.max_rows=50000")
    assert sum(1 for _ in job.rows("out")) == 3000
    assert sum(1 for _ in job.rows("job.errors")) == 3000
    assert sum(path.is_file() for path in job.folder.glob("out/**/*.jsonl")) < 10  # each error once cut an object


def test_a_slow_model_makes_no_more_objects(job: Job) -> None:
    job.requests(1500)
    model = (job.folder / "model.py").read_text()
    (job.folder / "model.py").write_text(f"import time\n{model}".replace("return", "time.sleep(0.01); return"))
    job.finish("--set", "batch.max_rows=8", "--set", "sink.file.max_rows=50000")  # two seconds with nothing to receive
    assert [len(path.read_bytes().splitlines()) for path in job.folder.glob("out/**/*.jsonl")] == [1500]


def test_a_job_reads_the_folder_its_file_is_in(job: Job) -> None:
    job.requests(10, into="in/in.jsonl")
    text = (job.folder / "job.yaml").read_text()
    (job.folder / "in/job.yaml").write_text(
        text.replace("model.py", "../model.py").replace("in.jsonl", ".").replace("path: out", "path: ../out")
    )
    run = subprocess.run(  # noqa: S603 - our own command
        [*COMMAND, "run", "job.yaml"], cwd=job.folder / "in", capture_output=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert sum(1 for _ in job.rows("out")) == 10
    assert (job.folder / "in.job.progress").exists()


def test_a_job_has_one_worker(job: Job) -> None:
    job.requests(1)
    worker = job.start("--workers", "2")
    assert worker.communicate(timeout=60)[0].endswith(b"--workers: one worker reads the files of a job; expected 1\n")
    assert worker.returncode == 1


# Jobs on tables


@pytest.fixture
def tables(job: Job) -> Job:
    """The same job on a folder of tables, and one table there."""
    (job.folder / "in").mkdir()
    text = (job.folder / "job.yaml").read_text()
    (job.folder / "job.yaml").write_text(text.replace("{path: in.jsonl}", "{path: in, format: parquet}"))
    pq.write_table(pa.table({"x": [[float(i), 0.5, 0.0] for i in range(10)]}), job.folder / "in/a.parquet")
    return job


def test_a_job_on_tables_that_cannot_go_on_keeps_what_is_done_and_says_what_to_mend(tables: Job) -> None:
    (tables.folder / "in/b.parquet").write_bytes(b"no table")
    worker = tables.start()
    said = worker.communicate(timeout=60)[0].decode()
    assert worker.returncode == 1
    assert "file:in/b.parquet: cannot be read as Parquet; expected a whole file of that format" in said
    pq.write_table(pa.table({"x": [[7.0, 0.5, 0.0]]}), tables.folder / "in/b.parquet")
    tables.finish()
    ids = [row["id"] for row in tables.rows("out")]
    assert ids == [*(f"a.parquet-{i}" for i in range(10)), "b.parquet-0"]


def test_the_format_of_requests_is_that_of_answers_alone(tables: Job) -> None:
    assert main(["check", str(tables.folder / "job.yaml"), "--set", "requests.format=raw", "--connect"]) == 0
    tables.finish("--set", "requests.format=json")
    assert [row["y"] for row in tables.rows("out")] == [[2.0 * i, 1.0, 0.0] for i in range(10)]


def test_nothing_is_sent_to_a_job(tables: Job, capsys: pytest.CaptureFixture[str]) -> None:
    rows = lines(tables.folder / "more.jsonl", b"{}")
    assert main(["send", str(tables.folder / "job.yaml"), "--file", str(rows)]) == 1
    assert "requests of a job are the rows of its files; add them there" in capsys.readouterr().err
