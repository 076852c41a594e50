"""The ``pairloop`` command: one verb per stage, thin; each verb takes ``--json``.

Rooms are imported inside the verbs, so that ``pairloop --help`` answers at once.
"""

from __future__ import annotations

import sys

import click

from pairloop import __version__
from pairloop.cli import (
    accounts,
    audit,
    bench,
    comparing,
    data,
    gate,
    jobs,
    keeping,
    keys,
    lab,
    loop,
    privacy,
    raters,
    schedule,
    serving,
    training,
    versions,
    webhooks,
)
from pairloop.cli.output import EXIT_SYSTEM_FAILURE
from pairloop.cli.verbs import Verbs


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="pairloop")
def pairloop() -> None:
    """Turns the picks people make between two answers into a better language model, again and again.

    Start with `pairloop demo`, or `pairloop init DIR` and `pairloop serve --config DIR`;
    `pairloop cycle status` says where the loop stands, and the page of a running server shows it.
    """


rooms = (
    serving,
    keeping,
    keys,
    accounts,
    loop,
    schedule,
    gate,
    raters,
    versions,
    privacy,
    audit,
    data,
    training,
    jobs,
    webhooks,
    lab,
    bench,
)
for command in (command for room in rooms for command in room.COMMANDS):
    pairloop.add_command(command)
lab.lab.add_command(comparing.compare)


def main() -> None:
    """The console script."""
    try:
        pairloop()
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(EXIT_SYSTEM_FAILURE)
