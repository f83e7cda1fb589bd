"""The store's own id, and the manager that may write: its epoch and its lease."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"

_REFUSED_BEFORE_ALEMBIC = 1000
"""A version that counts schemas itself does not know it, and leaves the store alone."""


def upgrade() -> None:
    table = op.create_table(
        "cluster",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("cluster", sa.String, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("held_by", sa.String, nullable=False),
        sa.Column("lease_until", sa.Float(53), nullable=False),
    )
    meta = sa.table("meta", sa.column("name"), sa.column("value"))
    epoch = op.get_bind().execute(sa.select(meta.c.value).where(meta.c.name == "epoch")).scalar() or 0
    op.bulk_insert(
        table,
        [
            {
                "id": 1,
                "cluster": secrets.token_hex(6),
                "epoch": epoch,
                "holder": "",
                "held_by": "",
                "lease_until": 0.0,
            }
        ],
    )
    op.execute(meta.delete())
    op.execute(meta.insert().values(name="schema", value=_REFUSED_BEFORE_ALEMBIC))
