"""Organisations, jobs with their events and metrics, model versions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "organisations",
        sa.Column("org_id", sa.String(64), primary_key=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_run_at", sa.DateTime(timezone=True)),
        sa.Column("promoted", sa.String(64)),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("org_id", sa.String(64), sa.ForeignKey("organisations.org_id"), nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("progress", sa.Float, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sa.Column("waiting_for", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.Column("completed_at", sa.DateTime(timezone=True)),
        sa.Column("lease_epoch", sa.Integer, nullable=False),
        sa.Column("lease_owner", sa.String(64)),
        sa.Column("heartbeat", sa.Integer, nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True)),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("request_hash", sa.String(64), nullable=False),
        sa.UniqueConstraint("org_id", "idempotency_key"),
    )
    op.create_index("jobs_by_status", "jobs", ["status"])
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
    )
    op.create_table(
        "metrics",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
    )
    op.create_table(
        "model_versions",
        sa.Column("training_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("org_id", sa.String(64), sa.ForeignKey("organisations.org_id"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("revision", sa.String(64)),
        sa.Column("quantization", sa.String(8), nullable=False),
        sa.Column("dtype", sa.String(8), nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
    )
    op.create_index("model_versions_by_org", "model_versions", ["org_id", "created_at"])


def downgrade() -> None:
    for name in ("model_versions", "metrics", "job_events", "jobs", "organisations"):
        op.drop_table(name)
