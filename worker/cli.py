"""The command `inferbus`: what the user types becomes a call, and what goes wrong an exit code.

Every command imports what it needs when it runs, so that `inferbus --help` answers at once, and a missing
extra hurts only the commands that need it.

Invariant: `main` is the only place that knows exit codes of failures, and nothing it prints holds a secret.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from inferbus.worker.settings import PipelineSettings

DONE, WRONG_INPUT, USAGE, AWAY, BUG, INTERRUPTED = 0, 1, 2, 3, 70, 130

NOT_YET = ("shadow", "model", "asyncapi")

EXIT_CODES = """\
exit codes: 0 done; 1 the file, the model or the port is wrong; 2 usage;
3 a dependency is away; 70 a bug in Inferbus (INFERBUS_DEBUG=1 shows the traceback)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; answers the exit code.

    Args:
        argv: What follows `inferbus`; by default this process's own.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in NOT_YET:
        return _not_yet(f"`inferbus {argv[0]}`")
    args = _parser().parse_args(argv)
    try:
        code: int = args.act(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us (`| head`) has what they wanted. Python would complain again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the one place where a failure becomes an exit code
        return _tell(error, args.redact)
    return code


def _tell(error: Exception, redact: Callable[[str], str]) -> int:
    from inferbus.connectors.base import Misconfigured, TooLarge, Unavailable  # noqa: PLC0415
    from inferbus.models.base import InvalidModel  # noqa: PLC0415
    from inferbus.worker.http import PortBusy  # noqa: PLC0415
    from inferbus.worker.logs import UnknownLogFormat  # noqa: PLC0415
    from inferbus.worker.pipeline_file import PipelineFileError  # noqa: PLC0415

    if isinstance(error, PipelineFileError):
        print(error, file=sys.stderr)  # noqa: T201 - file and line first, where editors look for them
        return WRONG_INPUT
    if isinstance(error, Misconfigured | TooLarge | InvalidModel | PortBusy | UnknownLogFormat):
        _say(redact(str(error)))
        return WRONG_INPUT
    if isinstance(error, Unavailable):
        _say(redact(str(error)))
        return AWAY
    debug = os.environ.get("INFERBUS_DEBUG") == "1"
    if debug:
        import traceback  # noqa: PLC0415

        _say(redact("".join(traceback.format_exception(error))))
    more = "" if debug else "; INFERBUS_DEBUG=1 shows the traceback"
    _say(redact(f"this is a bug in Inferbus: {type(error).__name__}: {error}{more}"))
    return BUG


def _say(text: str) -> None:
    print(f"inferbus: {text}", file=sys.stderr)  # noqa: T201


def _not_yet(what: str) -> int:
    _say(f"{what} is not available yet")
    return USAGE


# What each command does


def _load(args: argparse.Namespace) -> PipelineSettings:
    from inferbus.worker.pipeline_file import load  # noqa: PLC0415

    settings = load(args.pipeline, args.set)
    args.redact = settings.redact  # from here on `main` knows what it must not print
    return settings


def _demo(args: argparse.Namespace) -> int:
    from inferbus.worker.demo import demo  # noqa: PLC0415

    return demo(args.out)


def _run(args: argparse.Namespace) -> int:
    if args.role is not None or args.all:
        return _not_yet("`--role`" if args.role is not None else "`--all`")
    # What imports make is no garbage, and looking for some takes a tenth of the start. `run` turns it on again.
    gc.disable()
    settings = _load(args)
    from inferbus.worker.run import run  # noqa: PLC0415

    return run(settings, workers=args.workers, until_idle=args.until_idle)


def _check(args: argparse.Namespace) -> int:
    settings = _load(args)
    from inferbus.worker.check import check  # noqa: PLC0415

    return check(settings, connect=args.connect)


def _send(args: argparse.Namespace) -> int:
    settings = _load(args)
    from inferbus.worker.send import send  # noqa: PLC0415

    return send(settings, args.file, args.wait, timeout=args.timeout)


def _errors_list(args: argparse.Namespace) -> int:
    settings = _load(args)
    from inferbus.worker.errors import list_  # noqa: PLC0415

    return list_(settings, _chosen(args), as_json=args.json)


def _errors_show(args: argparse.Namespace) -> int:
    settings = _load(args)
    from inferbus.worker.errors import show  # noqa: PLC0415

    return show(settings, args.id)


def _errors_replay(args: argparse.Namespace) -> int:
    settings = _load(args)
    from inferbus.worker.errors import replay  # noqa: PLC0415

    return replay(settings, _chosen(args), rate=args.rate, max_replays=args.max_replays, dry_run=args.dry_run)


def _chosen(args: argparse.Namespace) -> Any:
    from inferbus.worker.errors import Choice  # noqa: PLC0415

    ids = frozenset(getattr(args, "id", ()))
    return Choice(ids, frozenset(args.code), frozenset(args.stage), args.since, args.limit)


def _schema(_args: argparse.Namespace) -> int:
    import json  # noqa: PLC0415

    from inferbus.worker.pipeline_file import schema  # noqa: PLC0415

    print(json.dumps(schema(), indent=2))  # noqa: T201 - what was asked for
    return DONE


# What the user may type


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inferbus",
        description="Model predictions for event-driven systems.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.set_defaults(redact=str)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    demo = _command(commands, "demo", _demo, "digits in, predictions out, on an embedded broker, in under a minute")
    demo.add_argument("--out", type=Path, default=Path("inferbus-demo"), metavar="DIR", help="default: inferbus-demo")

    run = _command(commands, "run", _run, "serve a pipeline until stopped")
    _takes_a_pipeline(run)
    run.add_argument("--workers", type=_count, default=1, metavar="N", help="processes; default 1")
    run.add_argument(
        "--until-idle", type=_seconds, metavar="SECONDS", help="end when there was nothing to do that long"
    )
    run.add_argument("--role", metavar="ROLE", help="not available yet")
    run.add_argument("--all", action="store_true", help="not available yet")

    check = _command(commands, "check", _check, "validate a pipeline file and its model; print the effective pipeline")
    _takes_a_pipeline(check)
    check.add_argument("--connect", action="store_true", help="also reach the source and every sink")

    send = _command(commands, "send", _send, "publish requests")
    _takes_a_pipeline(send)
    send.add_argument("--file", type=Path, required=True, metavar="ROWS.jsonl", help="each line is one request body")
    send.add_argument(
        "--wait", action="store_true", help="print each outcome as a JSON line; exits 0 when some are errors"
    )
    send.add_argument(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for outcomes; default 60",
    )

    _errors_parsers(_command(commands, "errors", None, "read error records, or replay them"))
    _command(commands, "schema", _schema, "print the JSON Schema of the pipeline file")
    return parser


def _errors_parsers(errors: argparse.ArgumentParser) -> None:
    actions = errors.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")

    listed = _command(actions, "list", _errors_list, "one line for each error record")
    _takes_a_pipeline(listed)
    _chooses(listed)
    listed.add_argument("--json", action="store_true", help="JSON lines instead of a table")

    show = _command(actions, "show", _errors_show, "one error record whole: headers, error and body")
    _takes_a_pipeline(show)
    show.add_argument("id", metavar="ID", help="the request's id")

    replay = _command(actions, "replay", _errors_replay, "publish the requests again")
    _takes_a_pipeline(replay)
    _chooses(replay)
    replay.add_argument("--id", action="append", default=[], metavar="ID", help="only this request; may be repeated")
    replay.add_argument("--rate", type=_rate, metavar="N/s", help="at most N requests a second")
    replay.add_argument(
        "--max-replays",
        type=_count,
        default=3,
        metavar="N",
        help="leave what was replayed N times; default 3",
    )
    replay.add_argument("--dry-run", action="store_true", help="say what would be published, and publish nothing")


def _command(
    commands: Any, name: str, act: Callable[[argparse.Namespace], int] | None, text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    if act is not None:
        parser.set_defaults(act=act)
    return parser


def _takes_a_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", metavar="PIPELINE.yaml", help="the pipeline file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=value",
        type=_override,
        help="override a setting; may be repeated",
    )


def _chooses(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--code", action="append", default=[], type=_code, help="only this error code; may be repeated")
    parser.add_argument("--stage", action="append", default=[], type=_stage, help="only this stage; may be repeated")
    parser.add_argument(
        "--since", type=_since, metavar="WHEN", help="only from then on: `2h` ago, or 2026-01-31T12:00:00Z"
    )
    parser.add_argument("--limit", type=_count, metavar="N", help="at most N records, the oldest first")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # noqa: PLC0415 - slow to load

        print(f"inferbus {version('inferbus')}")  # noqa: T201 - what was asked for
        parser.exit()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    from inferbus.connectors.settings import seconds  # noqa: PLC0415

    try:
        return seconds(text) if text[-1:].isalpha() else _number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected seconds, such as 3 or 3s, got {text!r}") from None


def _rate(text: str) -> float:
    try:
        value = _number(text.removesuffix("/s"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, such as 10 or 10/s, got {text!r}") from None
    if value == 0:
        raise argparse.ArgumentTypeError("expected more than 0/s")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError("expected a number of at least 0")
    return value


def _code(text: str) -> str:
    from inferbus.worker.outcomes import Code  # noqa: PLC0415

    return _one_of(get_args(Code), text)


def _stage(text: str) -> str:
    from inferbus.worker.outcomes import Stage  # noqa: PLC0415

    return _one_of(get_args(Stage), text)


def _one_of(allowed: Sequence[str], text: str) -> str:
    if text not in allowed:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(allowed)}, got {text!r}")
    return text


def _override(text: str) -> str:
    if not text.partition("=")[1]:
        raise argparse.ArgumentTypeError("expected a.b=value")  # without it, for it may be a password
    return text


def _since(text: str) -> float:
    """Unix seconds of a moment, or of a duration ago."""
    import time  # noqa: PLC0415
    from datetime import UTC, datetime  # noqa: PLC0415

    from inferbus.connectors.settings import seconds  # noqa: PLC0415

    try:
        return time.time() - seconds(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a duration such as 30m or 2h, or a time such as 2026-01-31T12:00:00Z, got {text!r}"
        ) from None
    # Records are stamped in UTC, so a time without a zone is read as UTC, wherever this machine is.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


if __name__ == "__main__":
    sys.exit(main())
