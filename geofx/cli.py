"""The command line: results on stdout, the rest on stderr, one exit code per kind of error."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from geofx import cli_options as options
from geofx import demo as demo_run
from geofx import doctor as examination
from geofx.cli_bench import bench
from geofx.cli_compare import compare
from geofx.cli_console import set_up_streams, show, show_error, show_json, show_usage_error, working
from geofx.cli_export import export
from geofx.cli_frontier import frontier
from geofx.cli_generate import generate
from geofx.cli_optimize import apply, optimize, plan
from geofx.cli_recover import recover
from geofx.cli_results import evaluate, inspect
from geofx.cli_taxonomy import taxonomy
from geofx.environment import version_of
from geofx.errors import ArtifactError, GeofxError, ResourceError, out_of_memory
from geofx.report_rows import plain
from geofx.report_table import report_tables

logger = logging.getLogger(__name__)

INTERRUPTED, BROKEN_PIPE = 130, 141
EXIT_CODES = (
    "Exit codes: 0 done; 1 a bug in geofx; 2 a wrong option, model, pattern or plan, or a missing package; "
    "3 the budget cannot be met; 4 unusable text or data; 5 values that are not finite; "
    "6 a file or folder that cannot be read or written; 7 an export failed or did not agree; "
    "8 too little disk or memory; 130 interrupted."
)

app = typer.Typer(
    name="geofx",
    help="Compress a model to a budget: factorize its matmuls where the loss notices least.",
    epilog=EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    set_up_streams(verbose=False)
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        code = app(given, prog_name="geofx", standalone_mode=False)
        sys.stdout.flush()
    except (GeofxError, MemoryError) as error:
        return _failed(error)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return _failed(_of_system(error))
    except Exception as error:
        return _failed(error) if out_of_memory(error) else _other(error)
    if code == INTERRUPTED:
        sys.stderr.write("interrupted\n")
    return code if isinstance(code, int) else 0


def _failed(error: BaseException) -> int:
    logger.debug("the command failed", exc_info=error)
    if not isinstance(error, GeofxError) or out_of_memory(error):
        fix = "use a smaller model, fewer --tokens or a shorter --length"
        error = ResourceError("out of memory", fix=fix)
    show_error(error)
    return error.exit_code


def _of_system(error: OSError) -> GeofxError:
    """A full disk behind stdout, or a file that cannot be used and that no command has looked at before."""
    what, where = f"the system refuses: {error.strerror or error}", str(error.filename or "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(what, where=where, fix="free some space")
    return ArtifactError(what, where=where, fix="--verbose shows where it failed")


def _other(error: Exception) -> int:
    """A wrong command line, which click's errors describe themselves, or a bug."""
    message, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if callable(message) and isinstance(code, int):
        show_usage_error(message() or "give a command")
        return code
    logger.error("this is a bug in geofx", exc_info=error)
    return 1


def _say_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"geofx {version_of('geofx')}\n")
        raise typer.Exit


@app.callback()
def _settings(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done, to stderr.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version and leave."),
    ] = False,
) -> None:
    set_up_streams(verbose)


def demo(
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FOLDER", help="Where the model, its export and the report go."
        ),
    ] = demo_run.FOLDER,
    as_json: options.Json = False,
) -> None:
    """Compress SmolLM2-135M, export it, and show it beside the original (under 10 minutes on 2 cores)."""
    with working() as progress:
        report = demo_run.run(output, progress)
    if as_json:
        show_json(report.to_json())
    else:
        show(*report_tables(report, regions=0), f"Report: {output / demo_run.REPORT}")


def doctor(as_json: options.Json = False) -> None:
    """Say what is installed, what is missing and how to install it."""
    checks = examination.examine()
    if as_json:
        show_json(examination.to_json(checks))
        return
    table = Table("", "found", "to do", header_style="bold")
    for check in checks:
        table.add_row(*(Text(plain(part)) for part in (check.name, check.found, check.fix)))
    show(table)


COMMANDS: tuple[tuple[str, Any], ...] = (
    ("optimize", optimize),
    ("plan", plan),
    ("apply", apply),
    ("recover", recover),
    ("inspect", inspect),
    ("export", export),
    ("generate", generate),
    ("eval", evaluate),
    ("bench", bench),
    ("frontier", frontier),
    ("compare", compare),
    ("taxonomy", taxonomy),
    ("demo", demo),
    ("doctor", doctor),
)
for _name, _command in COMMANDS:
    app.command(_name)(_command)
