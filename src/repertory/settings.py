"""Every environment variable, once.

The environment beats `.env`, which beats the defaults here. A training value that is left unset is resolved for each
job on its device (`repertory.model.hyperparameters`), and the resolved value is shown in the job's metadata.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from repertory.contracts import BUNDLED_MODEL, Hyperparameters, OrgId
from repertory.errors import InvalidInput


class Settings(Hyperparameters, BaseSettings):
    """The machine's settings. Field names are the environment variables, in lower case."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8300, ge=0, le=65535)
    allowed_hosts: str = ""  # comma-separated; empty: checked against loopback names when bound to loopback, else not
    api_key_secret: SecretStr | None = Field(None, min_length=32)  # unset: what the file holds
    api_key_secret_file: Path = Path("./models/api_key_secret")  # made with the first key
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    database_url: str = "sqlite:///./models/repertory.db"
    model_cache_dir: Path = Path("./models/cache")
    finetuned_model_dir: Path = Path("./models/finetuned")
    checkpoint_dir: Path = Path("./models/checkpoints")
    dataset_dir: Path = Path("./models/datasets")
    max_upload_gb: float = Field(2, gt=0)  # GiB of an export that is sent to /datasets

    huggingface_token: str | None = None
    hf_endpoint: str = Field("https://huggingface.co", pattern=r"^https?://[^\s/@]+(/[^\s@]*)?$")
    hf_hub_offline: bool = False
    hf_allow_private_addresses: bool = False  # a public hub may lead to files inside a private network
    hf_hub_download_timeout: int = Field(30, ge=1)  # seconds in which a download must bring something
    allowed_base_models: str = ""  # comma-separated names with * as a wildcard; empty: any
    default_base_model: str = BUNDLED_MODEL
    default_org_id: OrgId | None = None
    host_module: str = "repertory.model.host"  # what a host process runs; tests put the fake one here
    max_concurrent_generations: int = Field(256, ge=1)  # replies in the making or waiting, per service process
    generation_timeout_seconds: float = Field(300, gt=0)  # of a request for a reply, the longest and where it says none
    client_timeout_seconds: float = Field(30, gt=0)  # of waiting for a client that sends or reads next to nothing
    max_concurrent_trainings: int = Field(1, ge=1, le=64)  # per host
    training_share: float = Field(0.2, ge=0, le=0.9)  # of the device's time while requests run; else all of it
    max_gpu_memory_gb: float | None = Field(None, gt=0)  # GiB of device memory a host may use; unset: all of it
    adapter_memory_gb: float | None = Field(None, gt=0)  # GiB of adapters a host keeps; unset: a tenth of the memory
    adapter_slots: int = Field(32, ge=1, le=1024)  # voices that take part in a step

    # Of each organisation, where it has no limit of its own (`repertory orgs limits`); unset: none
    org_requests_per_minute: int | None = Field(None, ge=1)
    org_tokens_per_minute: int | None = Field(None, ge=1)
    org_concurrent_generations: int | None = Field(None, ge=1)
    org_queued_jobs: int | None = Field(None, ge=0)
    org_running_jobs: int | None = Field(None, ge=0)
    org_training_tokens_per_day: int | None = Field(None, ge=0)
    org_dataset_gb: float | None = Field(None, ge=0)
    org_model_gb: float | None = Field(None, ge=0)

    min_training_samples: int = Field(1, ge=1)  # conversations; below 100 a job carries a warning
    validation_split: float = Field(0.1, ge=0, lt=1)
    max_new_tokens: int = Field(500, ge=1)
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(0.9, gt=0, le=1)
    top_k: int = Field(50, ge=0)  # 0: no limit

    @field_validator("huggingface_token")
    @classmethod
    def fit_for_a_header(cls, token: str | None) -> str | None:
        """Files that hold a token end in a line break, which no HTTP header may hold."""
        token = (token or "").strip()
        if not all("!" <= character <= "~" for character in token):
            raise ValueError("holds a character that no token has; copy it again from the hub's page")
        return token or None

    @field_validator("hf_endpoint")
    @classmethod
    def an_address(cls, endpoint: str) -> str:
        try:
            urlsplit(endpoint).port  # noqa: B018  # raises where host or port are none
        except ValueError as error:
            raise ValueError(f"is no address: {error}") from error
        return endpoint

    @property
    def adapter_memory_bytes(self) -> int | None:
        return None if self.adapter_memory_gb is None else int(self.adapter_memory_gb * 2**30)

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The training values that the operator has set for all jobs."""
        return Hyperparameters.model_validate({name: getattr(self, name) for name in Hyperparameters.model_fields})


@cache
def settings() -> Settings:
    """Raises ValidationError for a wrong value, InvalidInput for a `.env` that is no text or may not be read."""
    try:
        return Settings()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"{Path('.env').absolute()} cannot be read: {error}",
            code="invalid_settings",
            cure="Save it as UTF-8 text that the service's user may read, or remove it.",
        ) from error
