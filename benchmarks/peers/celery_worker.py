"""Celery with celery-batches: a task that gets many calls at once, acknowledged late.

Answers are published to a queue with confirms, as everyone's are; py-amqp waits for each. With `--unconfirmed` it does
not ask for them, Celery's default: a broker that dies takes answers with it whose requests are acknowledged. The pool
is `solo`, the fastest here: another would carry each batch to a process and back.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery_batches import Batches
from kombu import Queue
from model import Model, arguments

args = arguments()
model = Model(args.model)
app = Celery("bench", broker=args.brokers)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue=args.source,
    # Celery declares it again, so it must say the same of it.
    task_queues=[Queue(args.source, queue_arguments={"x-queue-mode": "lazy"})],
    worker_prefetch_multiplier=args.prefetch,
    broker_transport_options={"confirm_publish": not args.unconfirmed},
)


@app.task(base=Batches, name="predict", flush_every=args.rows, flush_interval=0.1)  # type: ignore[untyped-decorator]
def predict(requests: list[Any]) -> None:
    """Answer one batch."""
    answers = model.answer([request.args[0] for request in requests])
    with app.producer_pool.acquire(block=True) as producer:
        for answer in answers:
            producer.publish(answer, routing_key=args.sink, exchange="", delivery_mode=2,
                             content_type="application/json", content_encoding="utf-8")  # fmt: skip


app.worker_main(["worker", "--pool=solo", "--concurrency=1", "--loglevel=WARNING", "--without-gossip",
                 "--without-mingle", "--without-heartbeat"])  # fmt: skip
