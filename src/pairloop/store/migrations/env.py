"""Run by Alembic inside ``pairloop.store.database.migrate``: on the connection that it was given, in its transaction."""

from __future__ import annotations

from alembic import context

from pairloop.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
