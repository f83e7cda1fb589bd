"""What was learned of each model."""

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    op.create_table(
        "experience",
        sa.Column("alias", sa.String, primary_key=True),
        sa.Column("key", sa.String, nullable=False),
        sa.Column("resting", sa.Boolean, nullable=False),
        sa.Column("measured", sa.JSON, nullable=False),
    )
