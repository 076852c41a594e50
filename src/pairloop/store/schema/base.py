"""What all tables share: the one MetaData, and the column that counts rows up."""

from __future__ import annotations

from sqlalchemy import BigInteger, Integer, MetaData

# Named, so that a later migration can drop or change a constraint on any database.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite counts up by itself only in a column of type INTEGER; elsewhere 32 bits would run out.
Sequence = BigInteger().with_variant(Integer(), "sqlite")
