"""What each worker said last."""

import sqlalchemy as sa
from alembic import op

revision = "5"
down_revision = "4"


def upgrade() -> None:
    op.create_table(
        "last_known",
        sa.Column("worker_id", sa.String, primary_key=True),
        sa.Column("description", sa.JSON, nullable=False),
    )
