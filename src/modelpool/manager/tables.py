"""The tables of the store, as the latest migration leaves them."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

cluster = sa.Table(
    "cluster",
    metadata,
    # One row.
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("cluster", sa.String, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("holder", sa.String, nullable=False),
    sa.Column("held_by", sa.String, nullable=False),
    sa.Column("lease_until", sa.Float(53), nullable=False),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("alias", sa.String, primary_key=True),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
    sa.Column("replaces", sa.JSON, nullable=False, server_default="[]"),
)

experience = sa.Table(
    "experience",
    metadata,
    sa.Column("alias", sa.String, primary_key=True),
    sa.Column("key", sa.String, nullable=False),
    sa.Column("resting", sa.Boolean, nullable=False),
    sa.Column("measured", sa.JSON, nullable=False),
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("digest", sa.String, nullable=False, unique=True),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
    sa.Column("revoked", sa.Integer),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("worker_id", sa.String, primary_key=True),
    sa.Column("url", sa.String, nullable=False),
)

last_known = sa.Table(
    "last_known",
    metadata,
    sa.Column("worker_id", sa.String, primary_key=True),
    sa.Column("description", sa.JSON, nullable=False),
)

draining = sa.Table(
    "draining",
    metadata,
    sa.Column("worker_id", sa.String, primary_key=True),
)
