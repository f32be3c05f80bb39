"""Every error a user can meet: what is wrong, where, why, and the cure.

RepertoryError
├── Unauthenticated         401  no API key, or none that works
├── Forbidden               403  the key is not for this
├── InvalidInput            422  the request cannot be carried out as written
├── NotFound                404  no such thing, or not yours
├── Conflict                409  the thing is not in a state for this
├── TooManyRequests         429  an organisation's limit is reached; `retry_after_seconds` says when to come again
├── Unavailable             503  not now; `retry_after_seconds` says when
├── DeadlineExceeded        504  the reply was not whole in the time that the request allows
└── JobFailed               500  a training run ended without a voice
    ├── BaseModelUnavailable     the base model cannot be loaded
    ├── InsufficientMemory       the base model or the run does not fit the device
    ├── StorageFailed            the disk refuses
    └── DataUnusable             no row to train on is left
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ErrorInfo(BaseModel):
    """An error as it crosses a process boundary or rests in a job row."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    cure: str
    param: str | None = None
    status: int = 500
    retry_after_seconds: float | None = None


class RepertoryError(Exception):
    """Something went wrong that the caller should read about."""

    status = 500
    code = "internal_error"
    cure = "Look into the service log for this request id; it names the place."

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        cure: str | None = None,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = _readable(message)
        self.code = code or type(self).code
        self.cure = _readable(cure or type(self).cure)
        self.param = param  # a JSON path into the request: conversations[12].messages[3].role
        self.retry_after_seconds = retry_after_seconds

    @property
    def info(self) -> ErrorInfo:
        return ErrorInfo(
            code=self.code,
            message=self.message,
            cure=self.cure,
            param=self.param,
            status=self.status,
            retry_after_seconds=self.retry_after_seconds,
        )

    @staticmethod
    def from_info(info: ErrorInfo) -> RepertoryError:
        """The error that `info` was made from, by its status and code."""
        for kind in (BaseModelUnavailable, InsufficientMemory, StorageFailed, DataUnusable):
            if info.code == kind.code:
                return kind(info.message, code=info.code, cure=info.cure, param=info.param)
        kinds: dict[int, type[RepertoryError]] = {
            422: InvalidInput,
            404: NotFound,
            409: Conflict,
            429: TooManyRequests,
            503: Unavailable,
            504: DeadlineExceeded,
        }
        kind_of_status = kinds.get(info.status, JobFailed)
        return kind_of_status(
            info.message,
            code=info.code,
            cure=info.cure,
            param=info.param,
            retry_after_seconds=info.retry_after_seconds,
        )


class Unauthenticated(RepertoryError):
    """Nobody knows who asks."""

    status = 401
    code = "missing_api_key"
    cure = 'Send a key of this service as "Authorization: Bearer rep_…"; `repertory keys create` makes one.'


class Forbidden(RepertoryError, PermissionError):
    """Whoever asks may not do this."""

    status = 403
    code = "insufficient_scope"
    cure = "Use a key with that scope."


class InvalidInput(RepertoryError, ValueError):
    """The request cannot be carried out as it is written."""

    status = 422
    code = "invalid_input"
    cure = "Correct the named field and send the request again."


class NotFound(RepertoryError, LookupError):
    """There is no such thing, or it belongs to somebody else."""

    status = 404
    code = "not_found"
    cure = "Check the identifier."


class Conflict(RepertoryError):
    """The thing is not in a state in which this can be done."""

    status = 409
    code = "conflict"
    cure = "Read its present state first."


class TooManyRequests(RepertoryError):
    """The organisation has reached a limit of its own."""

    status = 429
    code = "rate_limit_exceeded"
    cure = "Send the request again after the time in Retry-After, or ask the operator for a higher limit."


class Unavailable(RepertoryError):
    """Not at this moment."""

    status = 503
    code = "unavailable"
    cure = "Send the request again after the time in Retry-After."

    def __init__(self, message: str, *, retry_after_seconds: float | None = None, **about: str | None) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds or 2.0, **about)


class DeadlineExceeded(RepertoryError):
    """The reply was not whole in the time that the request allows."""

    status = 504
    code = "generation_timeout"
    cure = "Ask for fewer max_tokens, or for more time with timeout_seconds."


class JobFailed(RepertoryError):
    """A training run ended without a voice."""

    code = "job_failed"
    cure = "Read the message, change the job accordingly and start it again."


class BaseModelUnavailable(JobFailed):
    """The base model cannot be loaded: unknown name, no access, no network, unsupported."""

    code = "base_model_unavailable"
    cure = "Choose a base model that this machine can reach, or leave base_model out to use the default."


class InsufficientMemory(JobFailed, MemoryError):
    """The base model or the run does not fit the device."""

    code = "insufficient_memory"
    cure = "Set USE_4BIT=true, lower BATCH_SIZE or MAX_SEQ_LENGTH, or choose a smaller base model."


class StorageFailed(JobFailed):
    """A folder or file that is ours cannot be written or read."""

    code = "storage_failed"
    cure = "Check free space and permissions of the folders under ./models, or where the settings put them."

    @staticmethod
    def of(error: OSError) -> StorageFailed:
        what = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or str(error)
        return StorageFailed(f"the disk refused: {what}")


class DataUnusable(JobFailed):
    """No row to train on is left after rendering."""

    code = "data_unusable"
    cure = "Send conversations whose assistant turns fit into max_seq_length."


def _readable(text: str) -> str:
    """Names from outside, of files and columns say, may hold halves of surrogate pairs, which no JSON carries."""
    return text.encode("utf-8", "replace").decode()
