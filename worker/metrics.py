"""What a worker counts, and how Prometheus reads it.

Beside the path of a message: the pipeline adds to these numbers once per chunk or batch, the HTTP listener
renders them. One thread writes (the pipeline's), any thread may read. Writing is plain arithmetic on dicts
and lists: the locks and look-ups of the client library would cost as much as the rest of a small batch.

Invariant: no id, key or payload ever becomes a label: the pipeline file bounds the number of series.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

CounterName = Literal[
    "inferbus_messages_received_total",
    "inferbus_outcomes_total",
    "inferbus_batches_total",
    "inferbus_padding_rows_total",
    "inferbus_replies_total",
]
HistogramName = Literal["inferbus_batch_rows", "inferbus_stage_seconds", "inferbus_latency_seconds"]
GaugeName = Literal[
    "inferbus_inflight_messages", "inferbus_inflight_bytes", "inferbus_source_lag", "inferbus_model_info"
]

Outcome = Literal[
    "ok",
    "invalid_request",
    "too_large",
    "expired",
    "unknown_model",
    "model_error",
    "non_finite_output",
    "poison",
    "internal",
]
"""What became of a message: a prediction, or the code of its error record."""

Reason = Literal["full", "idle", "delay", "deadline", "drain"]
"""Why a batch was closed."""

Stage = Literal["queue", "decode", "predict", "encode", "write", "settle"]
"""The steps of the path of a message that are timed."""

SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
ROWS = tuple(float(2**power) for power in range(13))  # 1 .. 4096


class _Counter:
    """A number that only grows, per set of label values."""

    def __init__(self, name: CounterName, text: str, *labels: str) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._values: defaultdict[tuple[str, ...], int] = defaultdict(int)

    def add(self, labels: tuple[str, ...], n: int) -> None:
        self._values[labels] += n

    def reach(self, labels: tuple[str, ...], n: int) -> None:
        """Grow to `n`, counted elsewhere; a count that was corrected downwards waits until it is there again."""
        self._values[labels] = max(self._values[labels], n)

    def items(self) -> list[tuple[tuple[str, ...], int]]:
        """A copy made in one step of the interpreter: iterating would fail when a series appears."""
        return list(self._values.copy().items())

    def family(self) -> Metric:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self.items():
            family.add_metric(labels, value)
        return family


class _Gauge:
    """A number as it is now, per set of label values."""

    def __init__(self, name: GaugeName, text: str, *labels: str) -> None:
        self._name, self._text, self._labels = name, text, labels
        self.values: dict[tuple[str, ...], int] = {}

    def family(self) -> Metric:
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self.values.copy().items():
            family.add_metric(labels, value)
        return family


class _Series:
    """One histogram series: how many values fell into each bucket, the last one unbounded, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


class _Histogram:
    """A distribution over fixed buckets, per value of one label."""

    def __init__(self, name: HistogramName, text: str, label: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._label, self._bounds = name, text, label, bounds
        self._edges = [*map(str, bounds), "+Inf"]
        self._series: dict[str, _Series] = {}

    def series(self, label: str) -> _Series:
        series = self._series.get(label)
        if series is None:
            series = self._series[label] = _Series(self._bounds)
        return series

    def family(self) -> Metric:
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        for label, series in self._series.copy().items():
            buckets = list(zip(self._edges, accumulate(series.counts.copy()), strict=True))
            family.add_metric([label], buckets, series.total)
        return family


class Totals(NamedTuple):
    """The few numbers a person wants to watch; messages, over all models and sources."""

    received: int
    ok: int
    errors: int
    inflight: int
    lag: int | None


class Metrics:
    """Everything one worker exposes. Seconds are float; counts are of messages unless they say rows."""

    def __init__(self) -> None:
        self._received = _Counter("inferbus_messages_received_total", "Messages received from a source.", "source")
        self._outcomes = _Counter(
            "inferbus_outcomes_total",
            "Messages settled, by outcome: ok or an error code.",
            *("model", "version", "outcome"),
        )
        self._batches = _Counter(
            "inferbus_batches_total",
            "Batches given to the executor, by why they were closed.",
            *("model", "reason"),
        )
        self._padding = _Counter(
            "inferbus_padding_rows_total", "Rows added only to fill a batch to a compiled size.", "model"
        )
        self._replies = _Counter("inferbus_replies_total", "Replies to requesters, by what became of them.", "result")
        self._rows = _Histogram("inferbus_batch_rows", "Rows of a batch, without padding.", "model", ROWS)
        self._stages = _Histogram(
            "inferbus_stage_seconds", "Time a chunk or batch spends in a stage.", "stage", SECONDS
        )
        self._latency = _Histogram(
            "inferbus_latency_seconds", "Time from receiving a message to its settlement.", "model", SECONDS
        )
        self._messages = _Gauge("inferbus_inflight_messages", "Messages received and not yet settled.")
        self._bytes = _Gauge("inferbus_inflight_bytes", "Bytes of the messages received and not yet settled.")
        self._lag = _Gauge("inferbus_source_lag", "Messages on the bus that this worker has yet to receive.", "source")
        self._models = _Gauge(
            "inferbus_model_info",
            "The model being served; always 1.",
            *("model", "version", "executor", "device"),
        )
        for stage in get_args(Stage):
            self._stages.series(stage)
        self.set_inflight(0, 0)

    def received(self, source: str, n: int) -> None:
        """`n` messages came from `source`; 0 makes the series known before the first message."""
        self._received.add((source,), n)

    def outcomes(self, model: str, version: str, outcome: Outcome, n: int) -> None:
        """`n` messages were settled with this outcome."""
        self._outcomes.add((model, version, outcome), n)

    def batch(self, model: str, reason: Reason, rows: int) -> None:
        """A batch of `rows` real rows was closed for `reason`."""
        self._batches.add((model, reason), 1)
        self._rows.series(model).observe(rows)

    def padding(self, model: str, rows: int) -> None:
        """`rows` rows were added to a batch only to fill it."""
        self._padding.add((model,), rows)

    def set_replies(self, sent: int, failed: int, refused: int) -> None:
        """Replies so far: on their way, not delivered, and to addresses that are not allowed."""
        for result, count in (("sent", sent), ("failed", failed), ("refused", refused)):
            self._replies.reach((result,), count)

    def stage(self, stage: Stage, seconds: float, count: int = 1) -> None:
        """`count` chunks or batches spent `seconds` each in a stage."""
        self._stages.series(stage).observe(seconds, count)

    def latency(self, model: str, seconds: float, count: int) -> None:
        """`count` messages took `seconds` each from receipt to settlement."""
        self._latency.series(model).observe(seconds, count)

    def set_inflight(self, messages: int, size: int) -> None:
        """What is in flight now: messages, and their bytes."""
        self._messages.values[()] = messages
        self._bytes.values[()] = size

    def set_lag(self, source: str, messages: int | None) -> None:
        """How far `source` is behind; None, where it is not known, removes the series: 0 would be a claim."""
        if messages is None:
            self._lag.values.pop((source,), None)
        else:
            self._lag.values[source,] = messages

    def set_model(self, name: str, version: str, executor: str, device: str) -> None:
        """This model is being served."""
        self._models.values[name, version, executor, device] = 1
        # Start every series at 0: rate() cannot see the first increment of one that appears with it.
        for outcome in get_args(Outcome):
            self._outcomes.add((name, version, outcome), 0)
        for reason in get_args(Reason):
            self._batches.add((name, reason), 0)
        self._padding.add((name,), 0)
        self._rows.series(name)
        self._latency.series(name)

    def totals(self) -> Totals:
        """The sums a progress line shows. `lag` is None when no source knows its own."""
        outcomes = self._outcomes.items()
        ok = sum(n for labels, n in outcomes if labels[2] == "ok")
        lags = list(self._lag.values.copy().values())
        return Totals(
            received=sum(n for _, n in self._received.items()),
            ok=ok,
            errors=sum(n for _, n in outcomes) - ok,
            inflight=self._messages.values[()],
            lag=sum(lags) if lags else None,
        )

    def collect(self) -> Iterator[Metric]:
        """The families as `prometheus_client` collects them; safe on any thread."""
        yield self._received.family()
        yield self._outcomes.family()
        yield self._batches.family()
        yield self._rows.family()
        yield self._stages.family()
        yield self._latency.family()
        yield self._messages.family()
        yield self._bytes.family()
        yield self._lag.family()
        yield self._padding.family()
        yield self._replies.family()
        yield self._models.family()

    def render(self) -> bytes:
        """The Prometheus text format, version 0.0.4."""
        return generate_latest(self)


def parse_and_sum(texts: Sequence[str], retired: Sequence[str] = ()) -> bytes:
    """One exposition for several workers: counters, buckets and gauges added up, `inferbus_model_info` once.

    Args:
        texts: What the workers that run now expose.
        retired: The last words of workers that are gone. Their counters and histograms still count, or the
            sum would fall and Prometheus would take all of it for new; their gauges do not.
    """
    families: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], Sample]] = {}
    for text, gone in [*((text, False) for text in texts), *((text, True) for text in retired)]:
        for family in text_string_to_metric_families(text):
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            kept = sums.setdefault(family.name, {})
            for sample in family.samples if not (gone and family.type == "gauge") else ():
                series = sample.name, tuple(sample.labels.items())
                known = kept.get(series)
                if known is None:
                    kept[series] = sample
                elif sample.name == "inferbus_model_info":
                    kept[series] = known._replace(value=max(known.value, sample.value))
                else:
                    kept[series] = known._replace(value=known.value + sample.value)
    for name, family in families.items():
        family.samples = list(sums[name].values())
    return generate_latest(_Families(families.values()))


class _Families:
    """Families that are ready to be rendered."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
