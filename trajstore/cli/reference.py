"""The reference of the command line, made from the commands: ``python -m trajstore.cli.reference > docs/cli.md``."""

from __future__ import annotations

import click

from trajstore.cli import COMMANDS, main

_HEAD = """\
# Command line

<!-- Made by `python -m trajstore.cli.reference`; a test compares it with the commands. -->

Results go to stdout, everything else to stderr. Every command that prints takes `--json`, whose keys are named as the
Python attributes. An error is one `error:` line and, where there is a way out, one `hint:` line; `--traceback` shows
where it came from. Options with dashes are also known with underscores (`--ckpt_dir`, `--out_npz`, `--no_atomic`, …).
"""


def markdown() -> str:
    """The page, with the help of each command as it is printed in 100 columns."""
    pages = [_HEAD, _help(main, "trajstore")]
    group = click.Context(main, info_name="trajstore")
    for name in COMMANDS:
        command = main.get_command(group, name)
        if command is not None:
            pages += [f"## trajstore {name}\n", _help(command, name, group)]
        if isinstance(command, click.Group):
            inside = click.Context(command, parent=group, info_name=name)
            for part, inner in command.commands.items():
                pages += [f"### trajstore {name} {part}\n", _help(inner, part, inside)]
    return "\n".join(pages)


def _help(command: click.Command, name: str, parent: click.Context | None = None) -> str:
    context = click.Context(
        command,
        parent=parent,
        info_name=name,
        terminal_width=100,
        max_content_width=100,
        help_option_names=["-h", "--help"],
    )
    lines = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"```text\n{lines}\n```\n"


if __name__ == "__main__":
    click.echo(markdown(), nl=False)
