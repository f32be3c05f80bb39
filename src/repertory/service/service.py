"""The service, assembled: store, jobs, models, hosts and the dispatcher between them."""

from __future__ import annotations

import structlog

from repertory.service.admission import Admission
from repertory.service.datasets import Datasets
from repertory.service.dispatcher import Dispatcher
from repertory.service.erasure import Erasure
from repertory.service.hosts import Hosts
from repertory.service.imports import Imports
from repertory.service.jobs import Jobs
from repertory.service.keys import Keys, ServiceSecret
from repertory.service.metrics import Metrics
from repertory.service.models import Models
from repertory.service.organisations import Limits, Organisations
from repertory.service.quotas import Quotas
from repertory.service.store import Store
from repertory.settings import Settings

log = structlog.get_logger()


class Service:
    def __init__(self, settings: Settings) -> None:
        """Open the database and bring its schema up to date; nothing runs yet."""
        self.settings = settings
        self.store = Store(settings.database_url)
        self.store.migrate()
        self.keys = Keys(self.store, ServiceSecret(settings))
        self.keys.check_secret()
        self.organisations = Organisations(self.store, Limits.of_everybody(settings))
        self.datasets = Datasets(settings.dataset_dir)
        self.quotas = Quotas(self.store, self.organisations, settings.dataset_dir, settings.finetuned_model_dir)
        self.jobs = Jobs(self.store, self.datasets, self.quotas)
        self.models = Models(self.store, settings.finetuned_model_dir)
        self.imports = Imports(self.store, self.datasets, self.models, self.organisations)
        self.hosts = Hosts(settings)
        self.dispatcher = Dispatcher(
            settings, self.store, self.jobs, self.datasets, self.models, self.hosts, self.quotas
        )
        self.erasure = Erasure(
            self.store,
            self.jobs,
            self.imports,
            self.models,
            self.hosts,
            self.dispatcher.cancel,
            (settings.dataset_dir, settings.finetuned_model_dir, settings.checkpoint_dir),
        )
        self.admission = Admission(settings.max_concurrent_generations)
        self.metrics = Metrics(self)

    def start(self) -> None:
        if not self.keys.are_required():
            log.warning("open: no API key is set up, so whoever reaches this port may use it and read everything")
        self.hosts.start()
        self.dispatcher.start()
        self.imports.start()
        self.erasure.start()

    def stop(self) -> None:
        """Jobs that run now write a checkpoint and go back into the queue; the next start goes on with them."""
        self.erasure.stop()
        self.imports.stop()
        self.dispatcher.stop()
        self.hosts.stop()
        self.dispatcher.join()
        self.erasure.join()
        self.store.close()
