"""Creates Kafka topics: `python examples/create_topics.py localhost:9092 digits.requests digits.predictions`.

For trying things out: `--partitions` each, everything else as the broker has it. A topic that is there is left alone.
Needs confluent-kafka: `pip install 'inferbus[kafka]'`.
"""

import argparse
import sys
from collections.abc import Sequence

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic


def main(argv: Sequence[str] | None = None) -> int:
    """Create the topics named; answers 1 when one could not be."""
    parser = argparse.ArgumentParser(description="Create Kafka topics.")
    parser.add_argument("brokers", metavar="BROKERS", help="such as localhost:9092")
    parser.add_argument("topics", metavar="TOPIC", nargs="+")
    parser.add_argument("--partitions", type=int, default=4, metavar="N", help="of each topic; default 4")
    args = parser.parse_args(argv)

    admin = AdminClient({"bootstrap.servers": args.brokers})
    topics = [NewTopic(topic, num_partitions=args.partitions) for topic in dict.fromkeys(args.topics)]
    failed = 0
    for topic, created in admin.create_topics(topics, request_timeout=15.0).items():
        try:
            created.result()
            print(f"{topic}: created with {args.partitions} partitions")
        except KafkaException as error:
            if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
                print(f"{topic}: is there already")
            else:
                print(f"{topic}: {error.args[0].str()}", file=sys.stderr)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
