"""The command line: thin, and quick to start. Results go to stdout, progress and logs to stderr.

Exit codes: 0 done; 1 error; 2 usage; 3 the gate refused; 4 bad data; 5 integrity; 75 try again; 143 SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer

from fanbu.cli import align, choosing, extract, federation, feed, models, rounds, start, steps, ways
from fanbu.cli.language import language, localised
from fanbu.errors import FanbuError, UsageError

# Two runs on busy cores: threads that sleep while they wait are twice as quick as threads that spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="fanbu",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Specialists are born from a large model, and what they learn goes back into it, judged before it counts.",
)
for command in (
    start.init, start.doctor, choosing.plan, choosing.compare, choosing.worth, rounds.run, federation.serve_center,
    federation.join, rounds.report, rounds.watch, rounds.track, steps.shrink, feed.feed, steps.judge, steps.audit,
    align.align, extract.extract, models.history, models.promote, models.rollback, models.leave, models.export,
    models.predict,
):  # fmt: skip
    app.command()(command)
app.add_typer(ways.app, name="methods")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and end.")] = False,
) -> None:
    if version:
        import fanbu

        typer.echo(fanbu.__version__)
        raise typer.Exit


def _stop(number: int, frame: Any) -> None:
    sys.stderr.write("\nstopped; run the same command again to go on\n")
    sys.stderr.flush()
    os._exit(128 + number)  # at once, whatever a library is doing: finished stages are safe by construction


def commands() -> click.Command:
    """The whole command line in the language of this call."""
    from fanbu.lang import translator

    return localised(typer.main.get_command(app), translator("cli", language()))


def main() -> None:
    """Runs the command line and turns errors into messages and exit codes."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        sys.exit(commands()(prog_name="fanbu", standalone_mode=False) or 0)
    except FanbuError as error:
        _fail(error)
    except click.ClickException as error:
        _misused(error)
    except click.Abort:
        sys.stderr.write("ended by the user\n")
        sys.exit(1)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        from fanbu.files import disk_error

        told = disk_error(error, Path(str(error.filename or ".")))
        if not isinstance(told, FanbuError):
            raise
        _fail(told)


def see(code: str) -> str:
    """Where to read more about an error."""
    return f"docs/errors.md#{code}"


def _fail(error: FanbuError) -> NoReturn:
    _as_json(error)
    sys.stderr.write(f"error: {error}\nsee {see(error.code)}\n")
    sys.exit(error.exit_code)


def _misused(error: click.ClickException) -> NoReturn:
    """An unknown command or flag, in typer's own words."""
    from typer.rich_utils import rich_format_error

    rich_format_error(error)
    if type(error).__name__ != "NoArgsIsHelpError":
        _as_json(UsageError("flag", error.format_message(), remedy="see `--help`"))
        sys.stderr.write(f"see {see('flag')}\n")
    sys.exit(error.exit_code)


def _as_json(error: FanbuError) -> None:
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": {**error.as_dict(), "see": see(error.code)}}) + "\n")


if __name__ == "__main__":
    main()
