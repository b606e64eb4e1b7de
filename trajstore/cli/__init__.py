"""The command line: one group, whose commands are imported only when they are run."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any, NoReturn

import click

from trajstore.__about__ import __version__
from trajstore.errors import ConflictError, CorruptionError, TrajstoreError

#: Name of each command: where it is, and the first line of its help.
COMMANDS = {
    "info": ("trajstore.cli.info:info", "Show what a store holds, its size and rate, and whether it is being written."),
    "ls": ("trajstore.cli.ls:ls", "List trajectories: filtered, sorted, with the columns you choose."),
    "import": ("trajstore.cli.transfer:import_", "Take data of another format into a new store."),
    "export": ("trajstore.cli.transfer:export", "Write a store's trajectories in another format."),
    "verify": ("trajstore.cli.verify:verify", "Check every checksum, and name the trajectories that are damaged."),
    "repair": ("trajstore.cli.repair:repair", "Save what is whole of a damaged store into a new one."),
    "sample": ("trajstore.cli.sample:sample", "Read batches as training does; print keys, shapes and rates."),
    "merge": ("trajstore.cli.merge:merge", "Merge stores into a new one, by linking files where they fit."),
    "split": ("trajstore.cli.split:split", "Split a store into several, each trajectory into exactly one."),
    "compact": ("trajstore.cli.compact:compact", "Write a store anew, without gaps and deleted trajectories."),
    "delete": ("trajstore.cli.delete:delete", "Delete trajectories by one commit; they can be brought back."),
    "undelete": ("trajstore.cli.delete:undelete", "Bring deleted trajectories back."),
    "add-column": ("trajstore.cli.add_column:add_column", "Add a column, or a derived field, to a store."),
    "ckpt": (
        "trajstore.cli.checkpoint:checkpoint_group",
        "List, find, keep, compare and clean up training checkpoints.",
    ),
    "runs": ("trajstore.cli.checkpoint:runs_group", "List and compare the runs that trajstore.run.run_dir made."),
    "demo": ("trajstore.cli.demo:demo", "Collect, kill -9, resume, check, slice and export, in under a minute."),
}

DONE, FAILED, USAGE, DAMAGE, CONFLICT, INTERRUPTED = 0, 1, 2, 3, 4, 130

_EPILOG = """\b
Exit status: 0 done, 1 failed, 2 wrong usage, 3 damage found,
4 conflict with another writer (safe to retry), 130 interrupted.
\b
Shell completion (bash; likewise zsh_source, fish_source):
  eval "$(_TRAJSTORE_COMPLETE=bash_source trajstore)"
"""


class Commands(click.Group):
    """Loads a command when it is called, and turns every error into one ``error:`` and one ``hint:`` line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        try:
            code = super().main([word for word in words if word != "--traceback"], prog_name, **extra)
        except BaseException as error:
            code = _report(error, "--traceback" in words)
        sys.exit(code if isinstance(code, int) else DONE)


@click.group("trajstore", cls=Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trajstore", message="%(prog)s %(version)s")
@click.option("--traceback", is_flag=True, help="With any command: show where in the code an error came from.")
def main(traceback: bool) -> None:
    """A store for reinforcement-learning trajectories.

    \b
    Example:
      trajstore info run.zarr
    """


def _report(error: BaseException, with_traceback: bool) -> int:
    """Say what went wrong on stderr; the exit status."""
    if with_traceback:
        traceback.print_exception(type(error), error, error.__traceback__)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        _say("interrupted")
        return INTERRUPTED
    if isinstance(error, click.UsageError):
        name = error.ctx.command_path if error.ctx else "trajstore"
        _say(error.format_message(), getattr(error.__cause__, "hint", "") or f"{name} --help")
        return USAGE
    if isinstance(error, click.ClickException):
        _say(error.format_message())
        return error.exit_code
    if isinstance(error, TrajstoreError):
        _say(error.message, error.hint)
        return (
            CONFLICT if isinstance(error, ConflictError) else DAMAGE if isinstance(error, CorruptionError) else FAILED
        )
    if isinstance(error, (SystemExit, GeneratorExit)):
        raise error
    if isinstance(error, OSError):
        _say(str(error))
        return FAILED
    _say(f"{type(error).__name__}: {error}", "this is a defect of trajstore; run again with `trajstore --traceback …`")
    return FAILED


def _say(message: str, hint: str = "") -> None:
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint.replace('overwrite=True', '--overwrite')}", err=True)
