"""Whole workers on real Apache Kafka: what is promised holds while workers, brokers and requests do their worst."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from tests.end_to_end import (
    CHANCE,
    SIZES,
    Headers,
    Outcome,
    Request,
    Scene,
    Worker,
    asking,
    await_,
    body_of,
    good,
    good_ones,
    model_that,
    onnx_model,
    publish,
    refused,
    repeated_later,
    shuffled,
    value,
)
from tests.malformed import WIDTH, malformed
from tests.servers import Kafka, KafkaServer

pytestmark = pytest.mark.broker

Stage = Callable[..., Scene]
PROTOCOLS = pytest.mark.parametrize(
    "config",
    [{"heartbeat.interval.ms": 500}, {"group.protocol": "consumer"}],
    ids=["cooperative-sticky", "kip-848"],
)
POISON = 666.0


@pytest.fixture
def scene(kafka: Kafka, tmp_path: Path) -> Iterator[Stage]:
    """Makes scenes on the session's Kafka; what still runs at the end is killed."""
    with ExitStack() as stack:
        numbers = itertools.count(1)
        yield lambda **settings: stack.enter_context(Scene(kafka, tmp_path / f"scene-{next(numbers)}", **settings))


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A model that takes 5 ms for a batch, so that there is always something in flight to be hurt."""
    return model_that("time.sleep(0.005)", tmp_path / "slow")


def poisoned(serial: int, code: str) -> Request:
    """A request of 1 to 3 rows, the last of which is poison to the model."""
    rows = [(float(serial), 0.0, 0.0)] * (serial % 3)
    body = body_of([*rows, (float(serial), 0.0, POISON)])
    return refused(body, b"k%d" % serial, (("inferbus-id", b"p-%d" % serial),), code)


# Workers that die, come and go


def test_kill_9_in_a_loop_loses_nothing_and_repeats_no_more_than_was_in_flight(scene: Stage, slow: Path) -> None:
    at_most = 256
    the = scene(
        model=slow,
        flow={"max_inflight": at_most},
        batch={"max_rows": 16},
        # The next life of a static member takes its partitions over at once.
        config={"group.instance.id": "the-one"},
    )
    share = SIZES.requests_under_kills // SIZES.kills
    for life in range(SIZES.kills):
        the.publish(good_ones(share, first=life * share))
        before = the.outcomes.count()
        worker = the.worker()
        the.await_outcomes(before + CHANCE.randrange(1, share // 2))
        time.sleep(CHANCE.random() * 0.05)
        worker.kill()
    the.serve()

    assert the.accounted() <= at_most * SIZES.kills
    for repeated in repeated_later(the.outcomes.read()):
        assert repeated <= at_most


@PROTOCOLS
def test_workers_that_join_and_leave_under_load_give_each_request_exactly_one_outcome(
    scene: Stage, slow: Path, config: dict[str, Any]
) -> None:
    the = scene(model=slow, partitions=6, batch={"max_rows": 16}, config=config)
    crew = [the.worker().is_ready()]
    with the.load(rate=300):
        for _ in range(SIZES.rounds_of_workers):
            while len(crew) < 3:
                crew.append(the.worker().is_ready())
                await_all_serve(the, len(crew))
            while len(crew) > 1:
                crew.pop(0).stop()
                await_all_serve(the, len(crew))
    the.await_outcomes()
    crew.pop().stop()
    assert the.accounted() == 0


@PROTOCOLS
def test_workers_that_are_killed_among_others_under_load_lose_nothing(
    scene: Stage, slow: Path, config: dict[str, Any]
) -> None:
    at_most = 256
    the = scene(model=slow, partitions=6, flow={"max_inflight": at_most}, batch={"max_rows": 16}, config=config)
    crew = [the.worker().is_ready()]
    with the.load(rate=300):
        for _ in range(SIZES.rounds_of_workers):
            while len(crew) < 3:
                crew.append(the.worker().is_ready())
                await_all_serve(the, len(crew))
            crew.pop(0).kill()
            crew.pop(0).kill()
            await_all_serve(the, 1)
    the.await_outcomes()
    crew.pop().stop()
    assert the.accounted() <= 2 * SIZES.rounds_of_workers * at_most


def await_all_serve(the: Scene, workers: int) -> None:
    """Wait until so many workers have made predictions from now on, and every partition has."""

    def look() -> bool:
        fresh = the.outcomes.read()[before:]
        return (
            len({outcome.timing["worker"] for outcome in fresh}) >= workers
            and len({outcome.partition for outcome in fresh}) == 6
        )

    before = len(the.outcomes.read())
    await_(look, f"{workers} workers to serve", *the.workers)


def test_a_worker_that_slept_longer_than_its_session_serves_on_and_loses_nothing(scene: Stage, slow: Path) -> None:
    at_most = 256
    config = {"heartbeat.interval.ms": 500}
    the = scene(model=slow, partitions=6, flow={"max_inflight": at_most}, batch={"max_rows": 16}, config=config)
    sleeper = the.worker().is_ready()
    with the.load(rate=300):
        await_all_serve(the, 1)
        sleeper.process.send_signal(signal.SIGSTOP)
        other = the.worker().is_ready()
        await_all_serve(the, 1)  # with the sleeper's partitions, whose lease has run out
        sleeper.process.send_signal(signal.SIGCONT)
        await_all_serve(the, 2)
    the.await_outcomes()
    sleeper.stop()
    other.stop()
    assert the.accounted() <= at_most


def test_partitions_given_away_without_credit_are_read_again_when_they_come_back(scene: Stage, tmp_path: Path) -> None:
    # Starved of credit for longer than a second, a worker pauses its partitions.
    starving = model_that("time.sleep(1.5)", tmp_path / "starving")
    config = {"heartbeat.interval.ms": 500}
    the = scene(model=starving, flow={"max_inflight": 8}, batch={"max_rows": 8}, config=config)
    the.publish([asking([(float(n), 1.0, 1.0)], b"k%d" % n, (("inferbus-id", b"%d" % n),)) for n in range(64)])
    first = the.worker().is_ready()
    the.await_outcomes(8)
    second = the.worker().is_ready()
    await_(lambda: len(the.served_by()) == 2, "both to serve", first, second)
    second.stop()
    the.await_outcomes(timeout=50)
    first.stop()
    assert the.accounted() == 0


def test_sigterm_drains_so_that_a_second_run_sees_nothing_again(scene: Stage, slow: Path) -> None:
    the = scene(model=slow, batch={"max_rows": 8}, flow={"max_inflight": 128})
    the.publish(good_ones(SIZES.requests // 2))
    worker = the.worker()
    the.await_outcomes(100)
    worker.stop()
    served = the.outcomes.count()
    assert served < len(the.asked)
    assert sum(offset for offset in the.committed().values() if offset > 0) == served
    the.serve()
    assert the.accounted() == 0


def test_a_second_sigterm_releases_at_once(scene: Stage, tmp_path: Path) -> None:
    sleepy = model_that("if self.calls > 1: time.sleep(6)", tmp_path / "sleepy")
    the = scene(model=sleepy, batch={"max_rows": 8})
    the.publish(good_ones(100))
    worker = the.worker().is_ready()
    await_(lambda: value(worker, "inferbus_messages_received_total") == 100, "all to be received", worker)
    worker.terminate()
    worker.answers("/readyz", 503)
    began = time.monotonic()
    worker.terminate()
    assert worker.ended() == 0
    assert time.monotonic() - began < 4
    assert worker.said("released")
    the.file["model"] = str(onnx_model(tmp_path))
    the.serve()
    assert the.accounted() == 0


def test_messages_published_while_no_worker_ran_are_served(scene: Stage) -> None:
    the = scene()
    half = SIZES.requests // 2
    the.publish(good_ones(half))
    the.serve()
    the.publish(good_ones(half, first=half))
    the.serve()
    assert the.accounted() == 0


def test_several_workers_of_one_run_answer_for_all_at_the_parents_port(scene: Stage, slow: Path) -> None:
    the = scene(model=slow, partitions=6, batch={"max_rows": 16}, config={"heartbeat.interval.ms": 500})
    parent = the.worker("--workers", "2")
    parent.answers("/readyz", 200)
    with the.load(rate=300):
        await_all_serve(the, 2)
    the.await_outcomes()
    await_(lambda: value(parent, "inferbus_inflight_messages") == 0, "nothing in flight", parent)
    assert value(parent, "inferbus_messages_received_total") == len(the.asked)
    assert value(parent, "inferbus_outcomes_total") == len(the.asked)
    parent.stop()
    assert the.accounted() == 0
    children = [started["pid"] for started in parent.said("worker_started")]
    assert len(children) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


# The broker


def test_a_broker_restarted_under_load_costs_nothing_but_time(
    restartable_kafka: KafkaServer, slow: Path, tmp_path: Path
) -> None:
    with Scene(restartable_kafka, tmp_path, model=slow, batch={"max_rows": 16}) as the:
        worker = the.worker().is_ready()
        with the.load(rate=300):
            for _ in range(SIZES.broker_restarts):
                the.await_outcomes(the.outcomes.count() + 200)
                restartable_kafka.kill()
                worker.answers("/readyz", 503)
                restartable_kafka.start()
                worker.answers("/readyz", 200)
        the.await_outcomes()
        assert worker.running()
        worker.stop()
        the.accounted()


def test_a_worker_waits_for_its_broker_at_start_and_a_bounded_run_gives_up_in_the_end(
    restartable_kafka: KafkaServer, tmp_path: Path
) -> None:
    with Scene(restartable_kafka, tmp_path) as the:
        the.publish(good_ones(100))
        restartable_kafka.kill()
        worker = the.worker("--until-idle", "30", "--set", "retry.bounded=3s", "--set", "retry.start=60s")
        worker.has_said("waiting")
        restartable_kafka.start()
        the.await_outcomes()
        restartable_kafka.kill()
        assert worker.ended(timeout=60) == 3
        restartable_kafka.start()
        the.serve()
        assert the.accounted() <= 100


# Requests that cannot be answered


def test_malformed_requests_get_their_error_and_the_good_ones_among_them_their_prediction(
    scene: Stage, tmp_path: Path
) -> None:
    kinds = list(malformed())
    assert len(kinds) >= 30
    the = scene(model=onnx_model(tmp_path, WIDTH))
    requests = good_ones(SIZES.malformed, width=WIDTH)
    for serial, (_, body, headers) in zip(range(SIZES.malformed), itertools.cycle(kinds), strict=False):
        own: Headers = (("inferbus-id", b"m-%d" % serial), *headers, ("tenant", b"\xff"), ("tenant", b""))
        requests.append(refused(body, b"k%d" % serial, own, "invalid_request"))
    the.publish(shuffled(requests))
    the.serve()
    assert the.accounted() == 0


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (f"if (x[:, 2] == {POISON}).any(): raise ValueError('a secret of the model')", "model_error"),
        (f"if (x[:, 2] == {POISON}).any(): y = y[:-1]", "model_error"),
        (f"y[x[:, 2] == {POISON}] = np.nan", "non_finite_output"),
    ],
    ids=["raises", "too few rows", "NaN"],
)
def test_a_poison_row_in_a_batch_harms_only_its_request(scene: Stage, tmp_path: Path, harm: str, code: str) -> None:
    the = scene(model=model_that(harm, tmp_path / "model"))
    poison = (poisoned(serial, code) for serial in range(SIZES.requests // 100))
    the.publish(shuffled([*good_ones(SIZES.requests // 4), *poison]))
    the.serve()
    assert the.accounted() == 0
    errors = [outcome for outcome in the.outcomes.read() if outcome.error]
    assert not any(b"secret" in b"".join(value for _, value in error.headers) for error in errors)


def test_a_sick_device_ends_the_worker_and_nothing_is_dead_lettered(scene: Stage, tmp_path: Path) -> None:
    sick = model_that("if self.calls > 20: raise RuntimeError('out of order')", tmp_path / "sick")
    the = scene(model=sick, batch={"max_rows": 16})
    the.publish(good_ones(SIZES.requests // 4))
    worker = the.worker()
    assert worker.ended() == 70
    assert "warm-up" in worker.said("fatal")[0]["reason"]
    assert 0 < the.outcomes.count() < len(the.asked)
    the.file["model"] = str(onnx_model(tmp_path))
    the.serve()
    assert the.accounted() == 0


def test_deadlines_in_the_past_and_other_models_get_an_error_without_compute(scene: Stage, tmp_path: Path) -> None:
    # A worker that computed any of the refused would end, for it would fail on its warm-up too from then on.
    harm = f"self.hurt = getattr(self, 'hurt', False) or (x[:, 2] == {POISON}).any()\nif self.hurt: raise ValueError"
    the = scene(model=model_that(harm, tmp_path / "model"))
    now = int(time.time() * 1000)
    late: list[Headers] = [
        (("inferbus-deadline-ms", b"%d" % (now - 1000)),),
        (("inferbus-timeout-ms", b"1"),),
        (("inferbus-deadline-ms", b"%d" % (now + 3_600_000)), ("inferbus-timeout-ms", b"1")),
    ]
    fine: list[Headers] = [
        (("inferbus-deadline-ms", b"%d" % (now + 3_600_000)),),
        (("inferbus-timeout-ms", b"3600000"),),
        (("inferbus-model", b"model"),),
    ]
    poison = body_of([(1.0, 1.0, POISON)])
    requests = [refused(poison, b"k", headers, "expired") for headers in late]
    requests.append(refused(poison, b"k", (("inferbus-model", b"another"),), "unknown_model"))
    requests.append(refused(poison, b"k", (("inferbus-timeout-ms", b"soon"),), "invalid_request"))
    requests += [asking([(1.0, 2.0, 3.0)], b"k", headers) for headers in fine]
    the.publish(requests * 10)
    time.sleep(0.01)
    the.serve()
    assert the.accounted() == 0


def test_requests_that_expire_while_they_wait_for_the_model_get_an_error(scene: Stage, tmp_path: Path) -> None:
    the = scene(model=model_that("time.sleep(0.5)", tmp_path / "model"), batch={"max_rows": 1})
    worker = the.worker().is_ready()
    in_a_moment = (("inferbus-timeout-ms", b"700"),)
    impatient = asking([(1.0, 2.0, 3.0)], None, in_a_moment)
    the.asked += publish(the.brokers, the.topic, [good(serial) for serial in range(0, 9, 3)])
    placed = publish(the.brokers, the.topic, [impatient] * 5)
    the.await_outcomes(8)
    worker.stop()
    expired = [o for o in the.outcomes.read() if o.error]
    assert 3 <= len(expired) <= 5
    assert {o.error["code"] for o in expired} == {"expired"}
    ids = {outcome.id for outcome in expired}
    the.asked += [replace(r, expected=frozenset({"expired"})) if r.id in ids else r for r in placed]
    assert the.accounted() == 0


def test_headers_and_bodies_that_are_null_are_only_that(scene: Stage) -> None:
    the = scene()
    names = ["inferbus-id", "ce_id", "ce_source", "traceparent", "correlation_id", "inferbus-model", "content-type"]
    names += ["inferbus-deadline-ms", "inferbus-timeout-ms", "inference-header-content-length", "inferbus-error", "own"]
    the.publish([*good_ones(50), *good_ones(50, first=50)])
    producer = Producer({"bootstrap.servers": the.brokers})
    for name in names:
        producer.produce(the.topic, good(0).body, headers=[(name, None)])
        producer.produce(the.topic, None, headers=[(name, None)])
    assert producer.flush(30.0) == 0
    the.serve()
    assert the.outcomes.count() == 100 + 2 * len(names)
    errors = [outcome for outcome in the.outcomes.read() if outcome.error]
    assert len(errors) >= len(names)
    assert {error.error["code"] for error in errors} == {"invalid_request"}


# Sizes


def test_a_request_over_the_limit_and_a_prediction_over_the_sinks_limit_are_too_large(scene: Stage) -> None:
    the = scene(flow={"max_message_bytes": "8KiB"}, limits={"max.message.bytes": 2000})
    fits = good_ones(SIZES.requests // 10)
    answer_too_large = refused(body_of([(1.0, 2.0, 3.0)] * 500), b"a", (), "too_large")
    request_too_large = refused(body_of([(1.0, 2.0, 3.0)] * 5000), b"b", (), "too_large")
    the.publish(shuffled([*fits, *[answer_too_large] * 20, *[request_too_large] * 20]))
    the.serve()
    assert the.accounted() == 0
    stages = defaultdict(set)
    for error in (outcome for outcome in the.outcomes.read() if outcome.error):
        stages[error.key].add(error.error["stage"])
    assert stages == {b"a": {"write"}, b"b": {"receive"}}


def test_a_request_whose_id_or_key_alone_is_too_large_for_the_sinks_still_ends_as_an_error(scene: Stage) -> None:
    the = scene()
    at_most = 1_000_000  # what a client sends by default
    hostile = [
        refused(good(0).body, b"k", (("inferbus-id", b"i" * (at_most - 200)),), "too_large"),
        refused(good(0).body, b"k" * (at_most - 200), (), "too_large"),
        refused(b"{}", b"k" * (at_most - 200), (), "invalid_request"),
    ]
    the.publish(good_ones(50))
    producer = Producer({"bootstrap.servers": the.brokers, "message.max.bytes": 2 * at_most})
    for request in hostile:
        producer.produce(the.topic, request.body, request.key, headers=list(request.headers))
    assert producer.flush(30.0) == 0
    the.publish(good_ones(50, first=50))
    the.serve()
    assert the.outcomes.count() == 100 + len(hostile)
    codes = [outcome.error["code"] for outcome in the.outcomes.read() if outcome.error]
    assert sorted(codes) == ["invalid_request", "too_large", "too_large"]


def test_a_request_of_a_thousand_rows_gets_one_answer_of_a_thousand_rows_in_order(scene: Stage) -> None:
    the = scene(batch={"max_rows": 64})
    large = [asking([(float(row), float(n), 1.0) for row in range(1000)], b"large") for n in range(5)]
    the.publish([*good_ones(100), *large, *good_ones(100, first=100), *large])
    the.serve()
    assert the.accounted() == 0


def test_a_batch_the_client_cannot_decompress_is_skipped_offset_by_offset_and_the_partition_moves_on(
    scene: Stage,
) -> None:
    # The client may not take more than 1 MB in one piece, and a few hundred bytes on the wire become 20 MB.
    small = {"receive.message.max.bytes": 1_000_000, "fetch.max.bytes": 900_000, "message.max.bytes": 800_000}
    the = scene(config=small)
    the.publish(good_ones(100))
    poison = produced_as_one_batch(the, [bytes(1_000_000)] * 20)
    the.publish(good_ones(100, first=100))
    the.serve()
    the.asked += poison
    assert the.accounted() == 0


def produced_as_one_batch(the: Scene, bodies: list[bytes]) -> list[Request]:
    """Published to partition 0, compressed together."""
    large = {"message.max.bytes": 100_000_000, "batch.size": 100_000_000, "linger.ms": 500}
    producer = Producer({"bootstrap.servers": the.brokers, "compression.type": "zstd", **large})
    offsets: list[int] = []
    for body in bodies:
        producer.produce(the.topic, body, b"lost", 0, lambda _error, message: offsets.append(message.offset()))
    assert producer.flush(30.0) == 0
    lost = refused(b"", None, (), "too_large")
    return [replace(lost, topic=the.topic, partition=0, offset=offset) for offset in offsets]


# Nothing crosses


def test_two_pipelines_on_one_topic_do_not_disturb_each_other(scene: Stage, slow: Path) -> None:
    calm = scene(batch={"max_rows": 16})
    troubled = scene(requests=calm.topic, model=slow, batch={"max_rows": 16}, flow={"max_inflight": 256})
    first, second = calm.worker().is_ready(), troubled.worker().is_ready()
    calm.publish(good_ones(SIZES.requests // 2))
    troubled.asked = calm.asked
    troubled.await_outcomes(100)
    second.kill()
    calm.await_outcomes()
    first.stop()
    assert calm.accounted() == 0
    troubled.serve()
    assert 0 <= troubled.accounted() <= 256


def test_keys_ids_and_headers_never_cross(scene: Stage) -> None:
    the = scene(model=None)
    serials = itertools.count()

    def one(*headers: tuple[str, bytes], key: bytes | None = None, body: bool = True) -> Request:
        """A request of its own values under these headers; without a good body it is refused."""
        serial = float(next(serials))
        request = asking([(serial, 1.0, 2.0)], key, headers)
        return request if body else refused(b"{}", key, headers, "invalid_request")

    requests: list[Request] = []
    for n in range(SIZES.requests // 40):
        number = b"%d" % n
        trace = ("traceparent", b"00-%032x-%016x-01" % (n + 1, n + 1))
        for fine in (True, False):
            mark = b"good" if fine else b"bad"
            requests += [
                one(body=fine),
                one(key=b"", body=fine),
                one(key=b"\x00\xff" + number, body=fine),
                one(("inferbus-id", b"id-" + mark + number), trace, key=number, body=fine),
                one(("ce_id", mark + number), ("ce_source", b"//shop"), ("correlation_id", number), body=fine),
                one(("inferbus-id", b""), ("ce_id", number), body=fine),  # neither is enough
                one(("inferbus-id", b"first"), ("inferbus-id", b"last-" + mark + number), trace, trace, body=fine),
            ]
    the.publish(shuffled(requests))
    the.serve()
    assert the.accounted() == 0


def test_deliveries_that_share_an_id_each_get_an_outcome(scene: Stage) -> None:
    the = scene()
    the.publish(good_ones(100) * 5)
    the.serve()
    assert the.accounted() == 0


def test_the_id_of_the_body_is_echoed_in_the_body_and_the_other_in_the_header(scene: Stage) -> None:
    the = scene()
    body = json.dumps({"id": "mine", **json.loads(good(0).body)}).encode()
    the.publish([Request(body, None, (("inferbus-id", b"theirs"),), good(0).expected)])
    the.serve()
    (outcome,) = the.outcomes.read()
    assert (json.loads(outcome.body)["id"], outcome.id) == ("mine", "theirs")


def test_with_order_key_outcomes_of_a_key_leave_in_the_order_of_its_requests(scene: Stage, tmp_path: Path) -> None:
    restless = model_that("time.sleep(0.02 * np.random.default_rng().random())", tmp_path / "restless")
    model = {"path": str(restless), "replicas": 3}
    the = scene(order="key", batch={"max_rows": 8})
    the.file["model"] = model
    the.publish(good_ones(SIZES.requests // 2, keys=20))
    the.serve()
    assert the.accounted() == 0
    assert_in_order_of_requests(the.outcomes.read(), keys=20)


def test_order_key_holds_while_workers_come_and_go(scene: Stage, tmp_path: Path) -> None:
    restless = model_that("time.sleep(0.02 * np.random.default_rng().random())", tmp_path / "restless")
    model = {"path": str(restless), "replicas": 3}
    the = scene(order="key", partitions=6, batch={"max_rows": 8}, config={"heartbeat.interval.ms": 500})
    the.file["model"] = model
    crew = [the.worker().is_ready()]
    with the.load(rate=300):
        for _ in range(SIZES.rounds_of_workers):
            crew.append(the.worker().is_ready())
            await_all_serve(the, 2)
            crew.pop(0).stop()
            await_all_serve(the, 1)
    the.await_outcomes()
    crew.pop().stop()
    assert the.accounted() == 0
    assert_in_order_of_requests(the.outcomes.read(), keys=50)


def assert_in_order_of_requests(outcomes: list[Outcome], keys: int) -> None:
    """Of each key; the serial number of a request is in its id."""
    by_key = defaultdict(list)
    for outcome in outcomes:
        by_key[outcome.key].append(int(outcome.id.removeprefix("r-")))
    assert len(by_key) == keys
    assert all(serials == sorted(serials) for serials in by_key.values())


# A bounded run


def test_until_idle_waits_for_what_a_dead_members_lease_holds(scene: Stage, slow: Path) -> None:
    the = scene(model=slow, batch={"max_rows": 8}, flow={"max_inflight": 128})
    the.publish(good_ones(SIZES.requests // 4))
    dead = the.worker()
    the.await_outcomes(50)
    dead.kill()
    began = time.monotonic()
    the.serve()
    assert time.monotonic() - began > 4, "the dead member's session lasts 6 s"
    assert 0 <= the.accounted() <= 128


@pytest.mark.parametrize("commits", [True, False], ids=["committed", "aborted"])
def test_until_idle_ends_at_the_markers_of_a_transaction(scene: Stage, commits: bool) -> None:
    the = scene()
    the.publish(good_ones(50))
    producer = Producer({"bootstrap.servers": the.brokers, "transactional.id": the.group})
    producer.init_transactions(30.0)
    producer.begin_transaction()
    placed: list[tuple[int, int]] = []
    more = good_ones(20, first=50)
    for request in more:
        report = lambda _error, message: placed.append((message.partition(), message.offset()))  # noqa: E731
        headers = list(request.headers)
        producer.produce(the.topic, request.body, request.key, 0, report, headers=headers)
    if commits:
        producer.commit_transaction(30.0)
        the.asked += [
            replace(request, topic=the.topic, partition=partition, offset=offset)
            for request, (partition, offset) in zip(more, placed, strict=True)
        ]
    else:
        producer.flush(30.0)
        producer.abort_transaction(30.0)
    the.serve()
    assert the.accounted() == 0
    the.serve()
    assert the.accounted() == 0


# Starts that fail


def last_words(worker: Worker) -> str:
    """The one line for people at the end of its log."""
    lines = [line for line in worker.log().splitlines() if not line.endswith("}")]
    assert len(lines) == 1, worker.log()
    return lines[0]


def test_a_missing_topic_is_one_clear_line_and_exit_3(scene: Stage) -> None:
    the = scene()
    for place, topic in (("source", the.topic), ("sink", the.sink), ("errors", the.errors)):
        worker = the.worker("--set", "retry.start=1s", "--set", f"{place}.kafka.topic={topic}-missing")
        assert worker.ended() == 3
        assert last_words(worker).startswith(f'inferbus: kafka: topic "{topic}-missing" does not exist')


def test_wrong_brokers_are_one_clear_line_and_exit_3(scene: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as someone:
        port = someone.getsockname()[1]
    worker = scene().worker("--set", "retry.start=2s", "--set", f"source.kafka.brokers=127.0.0.1:{port}")
    assert worker.ended() == 3
    assert last_words(worker).startswith("inferbus: kafka: no broker answered within 5 s")


def test_a_busy_port_is_one_clear_line_and_exit_1(scene: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as someone:
        port = someone.getsockname()[1]
        worker = scene().worker("--set", f"http.port={port}")
        assert worker.ended() == 1
    assert last_words(worker).startswith("inferbus: ")
    assert str(port) in last_words(worker)


def test_a_model_that_cannot_be_served_is_one_clear_line_and_exit_1(scene: Stage, tmp_path: Path) -> None:
    the = scene()
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"not a model")
    sick = model_that("raise RuntimeError('no such device')", tmp_path / "sick")
    for model in (tmp_path / "missing.onnx", garbage, sick):
        worker = the.worker("--set", f"model={model}")
        assert worker.ended() == 1
        assert last_words(worker).startswith("inferbus: ")
