"""The group that every set of verbs is: its help has whole sentences, and it knows the verb that was meant."""

from __future__ import annotations

import click

WHOLE = 10_000
"""Characters of a sentence in the list of verbs: it is wrapped, never cut."""


class Verbs(click.Group):
    """A click group for people who do not know the verbs yet."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each verb with the first sentence of its help; click's own list cuts it at the end of the line."""
        rows = [(name, self.commands[name].get_short_help_str(WHOLE)) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a verb of a group below is named with the group, since `pairloop status` is what one types first."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            below = [name for name, child in self.commands.items() if isinstance(child, Verbs) and args[0] in child.commands]
            if not below:
                raise
            meant = " or ".join(f"'{ctx.command_path} {name} {args[0]}'" for name in sorted(below))
            raise click.UsageError(f"No such command '{args[0]}'. Did you mean {meant}?", ctx) from error
