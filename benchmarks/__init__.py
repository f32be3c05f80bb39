"""Measurements. Run as `make bench` and `make bench-train`; each prints what it measured, with the machine's facts."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the host does, before torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
