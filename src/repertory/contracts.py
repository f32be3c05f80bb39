"""What crosses the process boundary between the service and its hosts. No torch, no SQL.

A host speaks HTTP over a Unix socket:

    GET    /health            -> HostHealth
    POST   /generate          GenerateRequest -> TokenChunk per line (NDJSON); closing the connection stops the sequence
    POST   /runs              RunSpec -> RunEvent per line (NDJSON); closing the connection stops the run
    DELETE /runs/{id}         -> {} once the run has really stopped and its memory is free; 404 if there is none
    POST   /runs/{id}/interrupt  -> {}; the run will end after the step that it is at, with a checkpoint; 404 likewise
    POST   /evaluate          EvaluateRequest -> Evaluation
    POST   /estimate          EstimateRequest -> Estimate; also for a base model that this host does not hold
    POST   /hub/check         BaseKey -> {}; refused if the hub tells, within seconds, that it cannot be trained on
    POST   /preview           PreviewRequest -> Preview; likewise
    POST   /tokens            TokensRequest -> TokenReport; likewise
    POST   /adapters/load     AdapterRef -> {}
    POST   /adapters/unload   AdapterRef -> {}

Anything that is refused before its stream begins is answered with the status of the error and `{"error": ErrorInfo}`.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from repertory.data.conversations import Conversation, Message
from repertory.errors import ErrorInfo, InvalidInput

BUNDLED_MODEL = "bundled/SmolLM2-135M-Instruct"

Dtype = Literal["fp32", "bf16", "fp16"]
Quantization = Literal["none", "8bit", "4bit", "fp4"]  # 4bit is NF4
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
OrgId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class Contract(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hyperparameters(Contract):
    """How to train. None means: resolved for this job on this device."""

    lora_r: int | None = Field(None, ge=1, le=1024)
    lora_alpha: float | None = Field(None, gt=0, le=4096)
    lora_dropout: float | None = Field(None, ge=0, lt=1)
    lora_target_modules: str | list[str] | None = None  # "all-linear", "q_proj,v_proj" or a list of module names
    use_rslora: bool | None = None  # the update counts lora_alpha / sqrt(lora_r)
    batch_size: int | None = Field(None, ge=1, le=4096)  # with the next: rows of one optimizer step
    gradient_accumulation_steps: int | None = Field(None, ge=1, le=4096)
    gradient_checkpointing: bool | None = None
    optimizer: OptimizerName | None = None
    learning_rate: float | None = Field(None, gt=0, le=1)
    num_train_epochs: int | None = Field(None, ge=1, le=100)
    max_seq_length: int | None = Field(None, ge=8)  # tokens
    warmup_steps: int | None = Field(None, ge=0)
    prompt_loss_weight: float | None = Field(None, ge=0, le=1)  # of a token that is not the assistant's
    early_stopping_patience: int | None = Field(None, ge=0)  # evaluations without a new best; 0: never stop early
    canaries: int | None = Field(None, ge=0, le=100)  # made-up secrets to plant, and to ask for at the end
    save_steps: int | None = Field(None, ge=1)
    eval_steps: int | None = Field(None, ge=1)
    logging_steps: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    use_4bit: bool | None = None
    use_8bit: bool | None = None
    bnb_4bit_compute_dtype: Literal["fp32", "bf16", "fp16", "float32", "bfloat16", "float16"] | None = None
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None

    @model_validator(mode="after")
    def one_quantization(self) -> Hyperparameters:
        if self.use_4bit and self.use_8bit:
            raise ValueError("use_4bit and use_8bit are both true; choose one of them, or neither for no quantization")
        asked, compute = self.dtype, self.compute_dtype
        if not (self.use_8bit or self.use_4bit is False or asked in (None, "auto", compute) or compute is None):
            raise ValueError(
                f"dtype {asked} and bnb_4bit_compute_dtype {compute} differ, and 4-bit weights are computed in the"
                " precision of all the rest; set one of them"
            )
        return self

    @property
    def compute_dtype(self) -> Dtype | None:
        """`bnb_4bit_compute_dtype` by its short name."""
        short: dict[str | None, Dtype] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
        asked = self.bnb_4bit_compute_dtype
        return short.get(asked, asked)  # type: ignore[arg-type]

    def check_device(self, kind: str) -> None:
        """Raises InvalidInput where a device of this kind (cpu or cuda) cannot do what is asked for."""
        if kind == "cpu" and self.optimizer == "paged_adamw_8bit":
            raise InvalidInput(
                "paged_adamw_8bit moves the optimizer's state between a card and the host, and here is no card",
                code="unsupported_optimizer",
                cure="Use adamw_8bit, or leave optimizer out.",
                param="hyperparameters.optimizer",
            )

    def over(self, defaults: Hyperparameters) -> Hyperparameters:
        """These values, and where unset those of `defaults`. Asking for one quantization overrules the other, and for
        one precision that of 4-bit weights.
        """
        mine = self.model_dump(exclude_none=True)
        theirs = defaults.model_dump(exclude_none=True)
        if mine.get("use_4bit") or mine.get("use_8bit"):
            theirs.pop("use_4bit", None)
            theirs.pop("use_8bit", None)
        if "dtype" in mine:
            theirs.pop("bnb_4bit_compute_dtype", None)
        if "bnb_4bit_compute_dtype" in mine:
            theirs.pop("dtype", None)
        return Hyperparameters.model_validate(theirs | mine)


class Device(Contract):
    """What a host computes on."""

    kind: Literal["cpu", "cuda"]
    name: str
    count: int = 1
    memory_bytes: int
    has_bf16: bool  # bf16 matrix products at full speed


class BaseKey(Contract):
    """One base model as a host holds it. An adapter is served only on the key it was trained on."""

    base_model: str
    revision: str | None = None  # of one from the hub: the commit, once it is known; before, what was asked for
    quantization: Quantization
    dtype: Dtype

    @staticmethod
    def resolve(base_model: str, hyperparameters: Hyperparameters, device: Device) -> BaseKey:
        """Where nothing is set: NF4 on CUDA and no quantization on a CPU; bf16 where the device has it.

        `base_model` may carry a revision: `owner/name@revision`.
        """
        quantization: Quantization = "none"
        if hyperparameters.use_8bit:
            quantization = "8bit"
        elif hyperparameters.use_4bit or (device.kind == "cuda" and hyperparameters.use_4bit is None):
            quantization = "fp4" if hyperparameters.bnb_4bit_quant_type == "fp4" else "4bit"
        dtype: Dtype
        if hyperparameters.dtype in ("fp32", "bf16", "fp16"):
            dtype = hyperparameters.dtype
        elif quantization in ("4bit", "fp4") and hyperparameters.compute_dtype is not None:
            dtype = hyperparameters.compute_dtype
        elif device.has_bf16:
            dtype = "bf16"
        else:
            dtype = "fp16" if device.kind == "cuda" else "fp32"
        name, _, revision = base_model.partition("@")
        return BaseKey(base_model=name, revision=revision or None, quantization=quantization, dtype=dtype)

    @property
    def name(self) -> str:
        """As it is asked for: `owner/name@revision`."""
        return self.base_model if self.revision is None else f"{self.base_model}@{self.revision}"


class Download(Contract):
    """How far a download has come."""

    revision: str  # the commit that is downloaded
    bytes_done: int
    bytes_total: int
    bytes_per_second: float
    eta_seconds: float | None  # None: nothing came yet

    @property
    def percent(self) -> int:
        return 100 if not self.bytes_total else int(100 * self.bytes_done / self.bytes_total)

    def __str__(self) -> str:
        """For a job's row, which is written whenever this changes: no more often than a hundred times."""
        return f"{self.percent}% of {self.bytes_total / 1e6:.1f} MB"


DURATION_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


class Durations(Contract):
    """How long something took each time, as a histogram over DURATION_BOUNDS."""

    counts: list[int] = [0] * (len(DURATION_BOUNDS) + 1)  # above the bound before, up to its own; the last above all
    total_seconds: float = 0.0

    def and_one(self, seconds: float) -> Durations:
        at = bisect_left(DURATION_BOUNDS, seconds)
        counts = [count + (place == at) for place, count in enumerate(self.counts)]
        return Durations(counts=counts, total_seconds=self.total_seconds + seconds)


class AdapterTier(Contract):
    """The adapters in one place of a host's memory. Counts are since its start."""

    resident: int = 0
    in_use: int = 0  # of them, by sequences
    bytes: int = 0
    hits: int = 0  # sequences whose version was there when it was needed
    misses: int = 0
    failures: int = 0  # versions that could not be had
    evictions: int = 0  # to make room for another; not by unload
    loads: Durations = Durations()  # into this tier, from the one below


class HostStats(Contract):
    """What /metrics tells of a host beside its health. Counts are since its start."""

    steps: int = 0  # forward passes of serving
    kv_cache_usage: float = Field(0.0, ge=0, le=1)  # of the bytes that the engine allows itself
    prefix_cache_bytes: int = 0  # held
    prefix_cache_most_bytes: int = 0  # beyond which the least recently used leave
    adapters: dict[Literal["ram", "slots"], AdapterTier] = {}  # tiers; what is on disk the service knows


class HostHealth(Contract):
    state: Literal["loading", "ready", "failed"]
    phase: str = ""  # while loading: what is going on, for people
    device: Device | None = None  # known soon after the start, before the base model is loaded
    key: BaseKey | None = None  # with the commit, as soon as it is known
    download: Download | None = None  # while the base model is being downloaded
    error: ErrorInfo | None = None  # set when failed
    adapters: list[str] = []  # training ids of the adapters in memory
    running: int = 0  # sequences being decoded
    waiting: int = 0  # sequences in the queue
    runs: list[str] = []  # training ids of the runs in progress
    memory_bytes: int = 0  # of the host process, or on CUDA of the device
    parameters: int = 0  # of the base model
    stats: HostStats = HostStats()


class AdapterRef(Contract):
    """One immutable version of one organisation's voice."""

    org_id: OrgId
    training_id: str
    path: str  # absolute folder in PEFT format with a MANIFEST.json that verifies


class Forgetting(Contract):
    """An organisation is gone: its versions, and what is kept of its prompts, leave the memory."""

    org_id: OrgId
    training_ids: list[str]


class GenerateRequest(Contract):
    request_id: str
    org_id: OrgId
    adapter: AdapterRef | None  # None: the bare base
    messages: list[Message] = []  # the last one is the user's; a leading system message, or the recorded one is used
    prompt: str | None = None  # instead of messages: a text to be continued as it is, without the chat template
    temperature: float = Field(ge=0, le=2)  # 0: greedy
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0)  # 0: no limit
    max_tokens: int = Field(ge=1)
    stop: list[str] = []
    seed: int | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)  # likeliest tokens to tell at each place; None: no logprobs
    timeout_seconds: float | None = Field(None, gt=0)  # from its arrival at the host; an error ends it then

    @model_validator(mode="after")
    def something_to_answer(self) -> GenerateRequest:
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError("wants either messages or a prompt")
        return self


class Usage(Contract):
    """What a sequence has taken so far."""

    prompt_tokens: int
    completion_tokens: int
    dropped_messages: int = 0  # oldest messages of the history that did not fit into the context
    cached_tokens: int = 0  # of the prompt, whose keys and values were there already
    queue_seconds: float = 0.0  # until it had a place in the batch


class TokenLogprob(Contract):
    token: str
    logprob: float  # natural, of the model's own distribution, before temperature, top_k and top_p


class SampledToken(TokenLogprob):
    top: list[TokenLogprob] = []  # the likeliest at its place, likeliest first


class TokenChunk(Contract):
    """A piece of the reply; text appears only when it decodes cleanly and cannot be part of a stop string."""

    text: str = ""
    logprobs: list[SampledToken] = []  # where asked for: of the tokens that the text is made of
    finish_reason: Literal["stop", "length"] | None = None  # set on the last chunk
    usage: Usage | None = None  # on every chunk but an error
    error: ErrorInfo | None = None  # instead of a finish_reason: the sequence died


class TestPrompt(Contract):
    __test__ = False  # not a test class, whatever its name suggests to pytest

    instruction: str = Field(min_length=1, max_length=8000)
    expected_response: str | None = None


class RunSpec(Contract):
    """Everything a run needs. Paths are absolute; the folders are the run's own."""

    org_id: OrgId
    training_id: str
    base_model: str
    conversations_path: str  # JSON lines, one Conversation each
    output_dir: str  # the adapter appears here, MANIFEST.json last
    checkpoint_dir: str
    hyperparameters: Hyperparameters
    validation_split: float = Field(ge=0, lt=1)
    system_prompt: str | None = None
    current: AdapterRef | None = None  # the promoted version, to compare with, if it stands on the same base
    start: AdapterRef | None = None  # the version to go on from, on the same base and of the same shape
    publish_anyway: bool = False  # also if nothing was learned; the version is marked
    recorded_steps: int = 0  # of an earlier run of the job; what it learned after them is told again


class RunEvent(Contract):
    """One line of a run's story. `progress` never falls and is 1.0 only with `completed`.

    preparing   the run has left the queue; data: phase
    running     training begins; data: resolved metadata (hyperparameters, counts, resumed_from_step, warnings)
    step        one optimizer step; data: step, total_steps, epoch, loss, learning_rate, grad_norm, tokens_per_second,
                eta_seconds, and in fp16 loss_scale
    checkpoint  data: step
    evaluating  training is over; data: phase
    heartbeat   nothing new, but alive
    completed   data: metadata of the version, with the report; the folder at output_dir verifies
    failed      error is set
    cancelled   stopped on request; memory is free
    interrupted likewise, with a checkpoint of what was done since the last one

    `warnings` in the data of any of them are gathered in the job's metadata.
    """

    kind: Literal[
        "preparing",
        "running",
        "step",
        "checkpoint",
        "evaluating",
        "heartbeat",
        "completed",
        "failed",
        "cancelled",
        "interrupted",
    ]
    progress: float = Field(ge=0, le=1)
    data: dict[str, Any] = {}
    error: ErrorInfo | None = None


class EvaluateRequest(Contract):
    org_id: OrgId
    adapter: AdapterRef
    conversations_path: str | None = None  # the job's own data, of which the held-out part is scored
    conversations: list[Conversation] | None = None  # given: scored instead
    test_prompts: list[TestPrompt] = []


class EstimateRequest(Contract):
    key: BaseKey  # on which the job would run
    conversations: list[Conversation] | None = None
    conversations_path: str | None = None  # in their place
    hyperparameters: Hyperparameters
    validation_split: float = Field(ge=0, lt=1)
    system_prompt: str | None = None


class Estimate(Contract):
    """What a job would be and take. The first four are None where the base model's tokenizer is out of reach."""

    tokens: int | None = None  # of the training rows, each with its system prompt
    trained_tokens: int | None = None  # of them, those that are learned from
    truncated_rows: int | None = None  # lose their oldest messages to max_seq_length
    skipped_rows: int | None = None  # do not fit into it at all
    conversations: int
    steps: int
    epochs: int
    seconds: float | None = None  # None: no training on this base model was measured on this device yet
    peak_memory_bytes: int  # base model included
    available_memory_bytes: int  # to base model and run together
    fits: bool
    advice: list[str] = []
    hyperparameters: dict[str, Any]  # resolved


class PreviewRequest(Contract):
    key: BaseKey
    conversations: list[Conversation]
    hyperparameters: Hyperparameters  # max_seq_length counts
    system_prompt: str | None = None


class TokensRequest(Contract):
    key: BaseKey
    conversations_path: str  # JSON lines, one Conversation each
    hyperparameters: Hyperparameters  # max_seq_length counts
    system_prompt: str | None = None


class PreviewSpan(Contract):
    text: str  # special tokens included
    trained: bool


class PreviewRow(Contract):
    """A conversation exactly as the model will see it."""

    messages: list[Message]  # with the system prompt
    spans: list[PreviewSpan]  # none: the row is left out, too long even for its last exchange
    tokens: int
    trained_tokens: int
    dropped_messages: int  # its oldest, to fit


class Preview(Contract):
    base_model: str
    max_seq_length: int
    rows: list[PreviewRow]


class TestResponse(Contract):
    __test__ = False

    instruction: str
    generated_response: str
    base_response: str
    expected_response: str | None = None


class Evaluation(Contract):
    perplexity: float
    base_perplexity: float
    val_nll: float  # nats per trained token
    base_val_nll: float
    scored_tokens: int
    scored_conversations: int
    scored_on: Literal["held-out", "given", "training"]  # training: the job had nothing to hold out
    test_responses: list[TestResponse]
    total_parameters: int
    trainable_parameters: int
    model_size_mb: float
