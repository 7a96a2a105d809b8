"""What is counted, under exactly which names, and how several workers add up."""

from __future__ import annotations

import math
import threading
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from inferbus.worker.metrics import (
    ROWS,
    SECONDS,
    CounterName,
    GaugeName,
    HistogramName,
    Metrics,
    Outcome,
    Reason,
    Stage,
    parse_and_sum,
)

Series = tuple[str, frozenset[tuple[str, str]]]


def values(text: bytes) -> dict[Series, float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(text: bytes, name: str, **labels: str) -> float | None:
    return values(text).get((name, frozenset(labels.items())))


def used() -> Metrics:
    """Everything touched once."""
    metrics = Metrics()
    metrics.set_model("digits", "1a2b", "onnx", "cpu")
    metrics.received("kafka:digits.requests", 5)
    metrics.outcomes("digits", "1a2b", "ok", 3)
    metrics.outcomes("digits", "1a2b", "invalid_request", 1)
    metrics.batch("digits", "idle", 3)
    metrics.padding("digits", 5)
    metrics.set_replies(7, 2, 1)
    metrics.stage("predict", 0.003)
    metrics.latency("digits", 0.02, 4)
    metrics.set_inflight(1, 450)
    metrics.set_lag("kafka:digits.requests", 7)
    return metrics


def test_exactly_the_promised_names_are_exposed_with_their_labels() -> None:
    exposed = {
        (sample.name, frozenset(sample.labels) - {"le"})
        for family in text_string_to_metric_families(used().render().decode())
        for sample in family.samples
    }
    histograms = {"inferbus_batch_rows": "model", "inferbus_stage_seconds": "stage"}
    histograms["inferbus_latency_seconds"] = "model"
    assert exposed == {
        ("inferbus_messages_received_total", frozenset({"source"})),
        ("inferbus_outcomes_total", frozenset({"model", "version", "outcome"})),
        ("inferbus_batches_total", frozenset({"model", "reason"})),
        ("inferbus_inflight_messages", frozenset()),
        ("inferbus_inflight_bytes", frozenset()),
        ("inferbus_source_lag", frozenset({"source"})),
        ("inferbus_padding_rows_total", frozenset({"model"})),
        ("inferbus_replies_total", frozenset({"result"})),
        ("inferbus_model_info", frozenset({"model", "version", "executor", "device"})),
        *(
            (f"{name}_{part}", frozenset({label}))
            for name, label in histograms.items()
            for part in ("bucket", "sum", "count")
        ),
    }
    assert set(histograms) == set(get_args(HistogramName))
    assert {name for name, _ in exposed} >= {*get_args(CounterName), *get_args(GaugeName)}


def test_each_number_lands_where_it_belongs() -> None:
    text = used().render()
    model = {"model": "digits", "version": "1a2b"}
    assert value(text, "inferbus_messages_received_total", source="kafka:digits.requests") == 5
    assert value(text, "inferbus_outcomes_total", **model, outcome="ok") == 3
    assert value(text, "inferbus_outcomes_total", **model, outcome="invalid_request") == 1
    assert value(text, "inferbus_batches_total", model="digits", reason="idle") == 1
    assert value(text, "inferbus_batch_rows_sum", model="digits") == 3
    assert value(text, "inferbus_batch_rows_bucket", model="digits", le="2.0") == 0
    assert value(text, "inferbus_batch_rows_bucket", model="digits", le="4.0") == 1
    assert value(text, "inferbus_stage_seconds_bucket", stage="predict", le="0.0025") == 0
    assert value(text, "inferbus_stage_seconds_bucket", stage="predict", le="0.005") == 1
    assert value(text, "inferbus_latency_seconds_count", model="digits") == 4
    assert value(text, "inferbus_latency_seconds_sum", model="digits") == 0.08
    assert value(text, "inferbus_inflight_messages") == 1
    assert value(text, "inferbus_inflight_bytes") == 450
    assert value(text, "inferbus_source_lag", source="kafka:digits.requests") == 7
    assert value(text, "inferbus_padding_rows_total", model="digits") == 5
    assert [value(text, "inferbus_replies_total", result=r) for r in ("sent", "failed", "refused")] == [7, 2, 1]
    assert value(text, "inferbus_model_info", **model, executor="onnx", device="cpu") == 1


def test_the_model_info_line_is_a_gauge_of_that_very_name() -> None:
    text = used().render().decode()
    assert "# TYPE inferbus_model_info gauge\n" in text
    labels = 'device="cpu",executor="onnx",model="digits",version="1a2b"'
    assert f"inferbus_model_info{{{labels}}} 1.0\n" in text


def test_every_outcome_reason_and_stage_is_there_at_zero_before_the_first_message() -> None:
    metrics = Metrics()
    metrics.set_model("digits", "1", "onnx", "cpu")
    text = metrics.render()
    for outcome in get_args(Outcome):
        labels = {"model": "digits", "version": "1", "outcome": outcome}
        assert value(text, "inferbus_outcomes_total", **labels) == 0
    for reason in get_args(Reason):
        assert value(text, "inferbus_batches_total", model="digits", reason=reason) == 0
    for stage in get_args(Stage):
        assert value(text, "inferbus_stage_seconds_count", stage=stage) == 0


def test_setting_the_model_again_keeps_what_was_counted() -> None:
    metrics = used()
    metrics.set_model("digits", "1a2b", "onnx", "cpu")
    assert metrics.totals().ok == 3


def test_an_unknown_lag_is_absent_rather_than_zero() -> None:
    metrics = used()
    metrics.set_lag("kafka:digits.requests", None)
    metrics.set_lag("kafka:never.known", None)
    assert "inferbus_source_lag{" not in metrics.render().decode()
    assert metrics.totals().lag is None


def test_the_totals_are_over_all_sources_models_and_codes() -> None:
    metrics = used()
    metrics.received("sqs:other", 2)
    metrics.outcomes("letters", "2", "poison", 2)
    metrics.set_lag("sqs:other", 3)
    assert metrics.totals() == (7, 3, 3, 1, 10)


def test_a_label_with_quotes_and_newlines_survives_the_text_format() -> None:
    metrics = Metrics()
    metrics.received('kafka:"a"\\\nb', 1)
    assert value(metrics.render(), "inferbus_messages_received_total", source='kafka:"a"\\\nb') == 1


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10_000))))
def test_a_bucket_counts_all_observations_up_to_and_with_its_bound(seen: list[tuple[float, int]]) -> None:
    metrics = Metrics()
    for seconds, count in seen:
        metrics.stage("queue", seconds, count)
    exposed = {
        float(sample.labels["le"]): sample.value
        for family in metrics.collect()
        for sample in family.samples
        if sample.name == "inferbus_stage_seconds_bucket" and sample.labels["stage"] == "queue"
    }
    assert exposed == {
        bound: sum(count for seconds, count in seen if seconds <= bound) for bound in (*SECONDS, math.inf)
    }


def test_the_buckets_span_what_a_worker_sees() -> None:
    assert (SECONDS[0], SECONDS[-1]) == (0.0001, 60.0)
    assert ROWS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def test_a_scrape_while_series_appear_neither_fails_nor_tears() -> None:
    metrics = Metrics()
    done = threading.Event()

    def write() -> None:
        for number in range(3000):
            model = f"m{number % 300}"
            metrics.outcomes(model, "1", "ok", 1)
            metrics.latency(model, 0.01, 1)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    scrapes = 0
    while scrapes == 0 or not done.is_set():
        for family in metrics.collect():
            for sample in family.samples:
                if sample.name == "inferbus_latency_seconds_bucket" and sample.labels["le"] == "+Inf":
                    assert sample.value <= 10
        scrapes += 1
    writer.join()
    assert metrics.totals().ok == 3000


def test_workers_add_up_in_everything_but_the_model_info() -> None:
    one, two = used(), used()
    two.outcomes("digits", "1a2b", "ok", 10)
    two.received("kafka:another", 4)
    text = parse_and_sum([one.render().decode(), two.render().decode()])
    model = {"model": "digits", "version": "1a2b"}
    assert value(text, "inferbus_outcomes_total", **model, outcome="ok") == 16
    assert value(text, "inferbus_messages_received_total", source="kafka:another") == 4
    assert value(text, "inferbus_inflight_messages") == 2
    assert value(text, "inferbus_source_lag", source="kafka:digits.requests") == 14
    assert value(text, "inferbus_latency_seconds_bucket", model="digits", le="0.025") == 8
    assert value(text, "inferbus_latency_seconds_bucket", model="digits", le="0.01") == 0
    assert value(text, "inferbus_latency_seconds_count", model="digits") == 8
    assert value(text, "inferbus_model_info", **model, executor="onnx", device="cpu") == 1


def test_the_sum_over_one_worker_is_what_it_said_itself() -> None:
    text = used().render()
    assert parse_and_sum([text.decode()]) == text


def test_the_sum_over_no_worker_is_empty() -> None:
    assert parse_and_sum([]) == b""


def test_a_worker_that_is_gone_keeps_counting_but_holds_nothing_in_flight() -> None:
    gone, fresh = used(), Metrics()
    text = parse_and_sum([fresh.render().decode()], retired=[gone.render().decode()])
    assert value(text, "inferbus_messages_received_total", source="kafka:digits.requests") == 5
    assert value(text, "inferbus_latency_seconds_count", model="digits") == 4
    assert value(text, "inferbus_inflight_messages") == 0
    assert value(text, "inferbus_source_lag", source="kafka:digits.requests") is None
    assert value(text, "inferbus_model_info", model="digits") is None
