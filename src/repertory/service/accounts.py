"""Organisations and their keys for the command line, whether or not a service is running."""

from __future__ import annotations

from time import monotonic, sleep

from repertory.errors import Conflict, Unavailable
from repertory.service import erasure
from repertory.service.keys import Keys, ServiceSecret
from repertory.service.organisations import Limits, Organisations
from repertory.service.service import Service
from repertory.service.store import Store
from repertory.settings import Settings

SERVICE_SECONDS = 90.0  # a service that is running has begun and ended a deletion by then
LOOK_SECONDS = 0.1


class Accounts:
    def __init__(self, settings: Settings) -> None:
        self._store = Store(settings.database_url, alone=False)
        self._store.migrate()
        self.keys = Keys(self._store, ServiceSecret(settings))
        self.organisations = Organisations(self._store, Limits.of_everybody(settings))

    def close(self) -> None:
        self._store.close()


def delete(settings: Settings, org_id: str) -> None:
    """Delete an organisation: by the service that is running, or where none can be by ourselves.

    Returns when nothing is left. Raises NotFound, or Unavailable if no service does it: then the next to start will.
    """
    store = Store(settings.database_url, alone=False)
    try:
        erasure.ask(store, org_id)
        if not store.is_shared:
            _delete_alone(settings, org_id)
        deadline = monotonic() + SERVICE_SECONDS
        while erasure.is_there(store, org_id):
            if monotonic() > deadline:
                raise Unavailable(
                    "The organisation is shut out, and its deletion is asked for, but no service has done it yet.",
                    code="still_deleting",
                    cure="Start the service: it does it at once.",
                )
            sleep(LOOK_SECONDS)
    finally:
        store.close()


def _delete_alone(settings: Settings, org_id: str) -> None:
    """Does nothing where a service holds the database: that one does it."""
    try:
        service = Service(settings)
    except Conflict as in_use:
        if in_use.code != "database_in_use":
            raise
        return
    try:
        service.jobs.recover()  # no process is left that could run them
        service.erasure.erase(org_id)
    finally:
        service.hosts.stop()
        service.store.close()
