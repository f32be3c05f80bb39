"""`python -m src.main` starts the service on HOST:PORT."""

import sys

from repertory.service.server import serve

if __name__ == "__main__":
    sys.exit(serve())
