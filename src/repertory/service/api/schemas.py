"""The bodies of the native API, as design section 5 has them. Responses may grow; requests refuse what is unknown."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from repertory.contracts import Download, Estimate, Evaluation, Hyperparameters, OrgId, TestPrompt, Usage
from repertory.data.conversations import CleanText, Conversation, Message, SpokenText
from repertory.data.imports import ImportSummary


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HistoryMessage(Request):
    role: Literal["user", "assistant"]  # the instructions have a field of their own: system_prompt
    content: SpokenText


class StartTraining(Request):
    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["conversations"]}, {"required": ["dataset_id"]}]}
    )

    org_id: OrgId
    base_model: str | None = None
    conversations: list[Conversation] | None = Field(None, min_length=1)
    prepare: bool = False  # replace personal data in the conversations, and learn nothing twice
    dataset_id: str | None = None  # in their place: a dataset that is ready
    validation_split: float | None = Field(None, ge=0, lt=1)
    num_epochs: int | None = Field(None, ge=1, le=100)  # short for hyperparameters.num_train_epochs
    hyperparameters: Hyperparameters = Hyperparameters()
    system_prompt: SpokenText | None = None
    name: CleanText | None = Field(None, max_length=200)
    continue_from: str | None = None  # model_id of the organisation's version to go on from; base model and shape stay
    publish_anyway: bool = False  # also if the voice predicts held-out conversations worse than the base

    @model_validator(mode="after")
    def one_number_of_epochs(self) -> StartTraining:
        both = (self.num_epochs, self.hyperparameters.num_train_epochs)
        if None not in both and both[0] != both[1]:
            raise ValueError("num_epochs and hyperparameters.num_train_epochs differ; send one of them")
        return self

    @property
    def requested(self) -> Hyperparameters:
        if self.num_epochs is None:
            return self.hyperparameters
        return self.hyperparameters.model_copy(update={"num_train_epochs": self.num_epochs})


class TrainingStarted(BaseModel):
    training_id: str
    org_id: str
    status: str
    progress: float


class JobError(BaseModel):
    code: str
    message: str
    cure: str


class TrainingFindings(BaseModel):
    """What was found in the conversations that a job brought: the first 1,000, and how many of each code."""

    training_id: str
    findings: dict[str, Any] | None  # None: the job is on a dataset, whose report has them


class TrainingEstimate(Estimate):
    findings: dict[str, Any] | None  # in the conversations that were sent


class TrainingStatus(BaseModel):
    training_id: str
    org_id: str
    status: str
    progress: float
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    error: JobError | None
    metadata: dict[str, Any]


class TrainingJobs(BaseModel):
    jobs: list[TrainingStatus]


class TrainingCancelled(BaseModel):
    message: str
    training_id: str


class TrainingEvent(BaseModel):
    seq: int  # 1, 2, 3 … within the job
    at: datetime
    kind: str  # the status entered, or "warning"
    data: dict[str, Any]


class TrainingEvents(BaseModel):
    training_id: str
    events: list[TrainingEvent]


class EvaluateModel(Request):
    org_id: OrgId
    model_id: str = "latest"
    test_prompts: list[TestPrompt] = Field([], max_length=100)
    conversations: list[Conversation] | None = Field(None, min_length=1)  # scored instead of the held-out ones


class ModelEvaluated(BaseModel):
    model_path: str
    model_id: str
    metrics: Evaluation


class DatasetAccepted(BaseModel):
    dataset_id: str
    status: str


class DatasetStatus(BaseModel):
    dataset_id: str
    org_id: str
    status: Literal["queued", "preparing", "needs_persona", "ready", "failed"]
    progress: float  # of the export, as read
    created_at: datetime
    file_name: str
    file_bytes: int
    options: dict[str, Any]
    summary: ImportSummary | None  # once it is read
    error: JobError | None
    trained: list[str]  # the jobs that were started on it
    report: dict[str, Any] | None  # once it is ready


class DatasetList(BaseModel):
    datasets: list[DatasetStatus]


class DatasetAuthor(BaseModel):
    id: str
    name: str
    names: list[str]
    messages: int
    characters: int
    is_bot: bool
    first: float | None  # seconds since 1970 in UTC
    last: float | None


class DatasetAuthors(BaseModel):
    dataset_id: str
    authors: list[DatasetAuthor]  # those who speak most, at most 1,000
    count: int
    findings: dict[str, Any]


class Consent(BaseModel):
    """Conversations with words of one author."""

    datasets: dict[str, int]  # dataset id -> how many
    trainings: dict[str, int]  # training id -> how many
    unrecorded: list[str]  # jobs that brought conversations without saying whose words are in them


class Forgotten(Consent):
    unread: list[str]  # datasets that could never be read: delete them if the words may be in them
    message: str


class DatasetDeleted(BaseModel):
    message: str
    dataset_id: str


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


StopStrings = Annotated[
    list[Annotated[CleanText, Field(min_length=1, max_length=256)]], Field(max_length=16), BeforeValidator(_as_list)
]


class Generate(Request):
    system_prompt: CleanText | None = (
        None  # blank is the same as not sent: then the one recorded with the model is used
    )
    history: list[HistoryMessage] | None = None
    message: SpokenText
    temperature: float | None = Field(None, ge=0, le=2)  # 0: greedy
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)  # 0: no limit
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    stop: StopStrings = []
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    timeout_seconds: float | None = Field(None, gt=0, le=86_400)  # the service may allow less
    model_id: str = "latest"

    @property
    def messages(self) -> list[Message]:
        history = [Message(role=said.role, content=said.content) for said in self.history or []]
        spoken = [*history, Message(role="user", content=self.message)]
        if self.system_prompt is None or not self.system_prompt.strip():
            return spoken
        return [Message(role="system", content=self.system_prompt), *spoken]


class ModelInfo(BaseModel):
    org_id: str
    model_id: str
    model_path: str
    metadata: dict[str, Any]
    loaded: bool


class Generated(BaseModel):
    response: str
    finish_reason: str
    usage: Usage
    model_info: ModelInfo


class WhichModel(Request):
    """The body of load, unload and promote; the query may say the same."""

    org_id: OrgId | None = None
    model_id: str | None = None


class ModelLoaded(BaseModel):
    message: str
    model_info: ModelInfo


class ModelPromoted(BaseModel):
    message: str
    model_info: ModelInfo


class ModelUnloaded(BaseModel):
    message: str
    org_id: str


class ListedModel(BaseModel):
    model_id: str
    created_at: datetime
    promoted: bool
    metadata: dict[str, Any]


class ModelList(BaseModel):
    org_id: str
    models: list[ListedModel]
    count: int


class HostSummary(BaseModel):
    base_model: str
    quantization: str | None
    dtype: str | None
    state: Literal["ready", "starting"]
    phase: str
    download: Download | None  # of its base model, while that lasts
    adapters: int
    running: int  # replies being written
    waiting: int  # requests in its queue
    runs: int  # trainings
    memory_bytes: int


class HealthStatus(BaseModel):
    """What everybody may know."""

    status: Literal["starting", "healthy", "degraded"]


class Health(HealthStatus):
    version: str
    mode: Literal["open", "keys"]  # open: no API key is set up, so whoever reaches the port may use it
    cuda_available: bool
    cuda_device_count: int
    device: str | None  # None until the first host has looked
    loaded_models: int  # adapters in memory
    hosts: list[HostSummary]
    jobs: dict[str, int] | None  # by status, those that have not ended; None if the database does not answer
    error: JobError | None  # why the last host could not be
