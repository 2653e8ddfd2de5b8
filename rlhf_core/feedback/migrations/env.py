"""What Alembic runs: the steps that are missing, on the connection that `open_store` holds."""

from alembic import context

from rlhf_core.feedback.store import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
