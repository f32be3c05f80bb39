"""How long a service takes to answer several clients at once, for comparisons: alone, and beside something else."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import quantiles

import httpx

from running_service import RunningService

CLIENTS = 6
WORDS = 12  # of a reply: a quarter of a second of the fake host, so that a busy machine's hiccups weigh little


def p99_seconds(service: RunningService, org_id: str, seconds: float) -> float:
    """Of short replies in the organisation's voice. Every one of them must be whole."""
    ends = time.monotonic() + seconds

    def ask(_: int) -> list[float]:
        taken = []
        with httpx.Client(base_url=f"{service.url}/api/v1", trust_env=False, timeout=60) as client:
            while (begin := time.monotonic()) < ends:
                body = {"message": "a long one", "max_tokens": WORDS}
                answer = client.post(f"/generate?org_id={org_id}", json=body)
                assert answer.status_code == 200, answer.text
                assert answer.json()["usage"]["completion_tokens"] == WORDS
                taken.append(time.monotonic() - begin)
        return taken

    with ThreadPoolExecutor(CLIENTS) as clients:
        taken = [each for one in clients.map(ask, range(CLIENTS)) for each in one]
    return quantiles(taken, n=100, method="inclusive")[98]
