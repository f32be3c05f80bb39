"""API keys, limits of organisations, and their deletion."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(8), primary_key=True),
        sa.Column("org_id", sa.String(64), sa.ForeignKey("organisations.org_id")),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.Column("last_used_at", sa.DateTime(timezone=True)),
    )
    op.add_column("organisations", sa.Column("limits", sa.JSON, nullable=False, server_default="{}"))
    op.add_column("organisations", sa.Column("deletion_asked_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("organisations", "deletion_asked_at")
    op.drop_column("organisations", "limits")
    op.drop_table("api_keys")
