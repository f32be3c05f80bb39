"""What becomes of lines that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import structlog
from repertory import logs
logs.configure("DEBUG")
log = structlog.get_logger()
for say in (log.debug, log.info, log.warning, log.error, log.critical):
    say("lost")
try:
    raise ValueError
except ValueError:
    log.exception("lost")
print("goes on")
"""


def test_a_line_that_nobody_can_read_any_more_is_lost_and_nothing_else() -> None:
    read, write = os.pipe()
    os.close(read)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, stderr=write)
    os.close(write)
    assert said.stdout == b"goes on\n"
