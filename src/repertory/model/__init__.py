"""Everything that needs torch."""

import logging
import sys

# Where the package `kernels` is installed, bitsandbytes and transformers fetch native code from a hub with it, unasked
# and at import; where it is not, bitsandbytes advises to install it. Code of others comes when installing, or never.
sys.modules["kernels"] = None  # type: ignore[assignment]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
