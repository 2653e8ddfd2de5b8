"""The first tables: people, items, who was shown what, guidelines, judgements."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    time = sa.DateTime(timezone=True)
    op.create_table(
        "annotators",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(80), nullable=False, unique=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("password_hash", sa.String(255)),
        sa.Column("created_at", time, nullable=False),
    )
    op.create_table(
        "items",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", sa.String(64), nullable=False, unique=True),
        sa.Column("ticket", sa.String(32), nullable=False, unique=True),
        sa.Column("kind", sa.String(16), nullable=False, index=True),
        sa.Column("prompt", sa.JSON, nullable=False),
        sa.Column("responses", sa.JSON, nullable=False),
        sa.Column("sources", sa.JSON, nullable=False),
        sa.Column("category", sa.String(80), nullable=False),
        sa.Column("overlap", sa.Integer, nullable=False),
        sa.Column("created_at", time, nullable=False),
    )
    op.create_table(
        "claims",
        sa.Column("annotator_id", sa.Integer, sa.ForeignKey("annotators.id"), primary_key=True),
        sa.Column("item_id", sa.Integer, sa.ForeignKey("items.id"), primary_key=True),
        sa.Column("shown_at", time, nullable=False),
    )
    op.create_table(
        "guidelines",
        sa.Column("version", sa.String(12), primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_table(
        "judgements",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("client_id", sa.String(64), nullable=False, unique=True),
        sa.Column("annotator_id", sa.Integer, sa.ForeignKey("annotators.id"), nullable=False, index=True),
        sa.Column("item_id", sa.Integer, sa.ForeignKey("items.id"), nullable=False, index=True),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("ranks", sa.JSON),
        sa.Column("presented", sa.JSON, nullable=False),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("guideline", sa.String(12), sa.ForeignKey("guidelines.version"), nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("withdrawn_at", time),
    )
    live = sa.text("withdrawn_at IS NULL")
    op.create_index(
        "one_live_judgement", "judgements", ["annotator_id", "item_id"], unique=True,
        sqlite_where=live, postgresql_where=live,
    )  # fmt: skip
