"""Written responses, scores by axis, and gold questions."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add columns; what was judged before has none of it."""
    op.add_column("items", sa.Column("axes", sa.JSON, nullable=False, server_default="[]"))
    op.add_column("items", sa.Column("gold", sa.JSON))
    op.add_column("items", sa.Column("gold_from", sa.Integer))
    op.add_column("judgements", sa.Column("scores", sa.JSON))
    op.add_column("judgements", sa.Column("written", sa.Text))
