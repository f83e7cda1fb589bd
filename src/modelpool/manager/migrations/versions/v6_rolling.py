"""What is replaced, and which workers are being drained."""

import sqlalchemy as sa
from alembic import op

revision = "6"
down_revision = "5"


def upgrade() -> None:
    op.add_column("models", sa.Column("replaces", sa.JSON, nullable=False, server_default="[]"))
    op.create_table("draining", sa.Column("worker_id", sa.String, primary_key=True))
