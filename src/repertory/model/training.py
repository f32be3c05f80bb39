"""A training run: from stored conversations to a voice that was proven, in small steps.

The run is a generator driven by `step()`. It yields after every forward and every backward pass, so that the host can
answer live requests in between, stop it, or let another run go on; nothing that it computes depends on when that
happens. A run that died goes on from its last checkpoint and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from repertory.contracts import RunEvent, RunSpec, TestPrompt
from repertory.data.prepare import read_conversations
from repertory.data.render import Row
from repertory.errors import InvalidInput, JobFailed, Unavailable
from repertory.manifest import MANIFEST, verify, write_durably, write_manifest
from repertory.model import certificate, hyperparameters
from repertory.model.adapter import Adapter, AdapterUnusable, LoraConfig
from repertory.model.base import Base
from repertory.model.certificate import ENOUGH_REPLIES, Check
from repertory.model.checkpoint import Checkpoint, State
from repertory.model.engine import Engine
from repertory.model.evaluation import SHOWN_PROMPTS, Score, prompts_from, replies, score
from repertory.model.general_chats import general_chats
from repertory.model.hyperparameters import TrainConfig
from repertory.model.layers import choose_layers
from repertory.model.lora import Training
from repertory.model.microbatch import MicroBatch, common_prefix, with_prompt_loss
from repertory.model.optimizer import new_optimizer
from repertory.model.plan import Cut, Plan, Work
from repertory.model.probe import does_not_fit, is_out_of_memory, probe, release
from repertory.model.training_data import TrainingData, training_data
from repertory.model.voices import METADATA, provenance, read_version

REPORT = "report.json"
LOSS_SCALE = 65536.0  # to begin with; halved where gradients overflow, doubled after this many steps in which none did:
STEPS_TO_GROW = 200
EXPLODED = 3.0  # times the loss of the base, or of guessing: no noise of a batch reaches that
Story = Generator[RunEvent | None, None, None]


@dataclass
class Prepared:
    """What a run goes by, once its conversations are read and its base model is measured."""

    data: TrainingData
    checks: list[Check]  # of the rows
    config: TrainConfig
    fingerprint: str
    plan: Plan
    state: State
    scored_rows: list[Row]  # the held-out ones, or where there are none those that are trained on
    metadata: dict[str, Any]

    def score_of(self, row_nll: list[float]) -> Score:
        return Score(row_nll, [row.trained_tokens for row in self.scored_rows])

    def warn(self, warning: str) -> None:
        self.metadata["warnings"] = [*self.metadata["warnings"], warning]


class TrainingRun:
    """One job on one base model."""

    def __init__(self, spec: RunSpec, base: Base, engine: Engine) -> None:
        self.spec = spec
        self.base = base
        self.engine = engine
        self.work = Work()
        # fp16 rounds small gradients to zero; of a loss that is scaled up they are large enough. It does nothing in
        # other precisions. https://arxiv.org/abs/1710.03740
        self.scaler = torch.amp.GradScaler(
            base.device.type,
            init_scale=LOSS_SCALE,
            growth_interval=STEPS_TO_GROW,
            enabled=base.dtype is torch.float16,
        )
        self.is_midway = False  # between the forward and the backward pass of a micro-batch, with its activations
        self._is_learning = False
        self._is_interrupted = False
        self.overflowed: list[int] = []  # steps, once for each time that they went again with half the scale
        self._routing: Training | None = None
        self._story = self._live()

    def step(self) -> RunEvent | None:
        """Do one portion of the work. Raises RepertoryError if the run has failed, StopIteration after its end."""
        return next(self._story)

    def close(self) -> None:
        """Stop here; what the run held in memory is let go."""
        self._story.close()

    def interrupt(self) -> bool:
        """End after the step that is being computed, with a checkpoint. False outside of the steps, where all that a
        resume can use is saved already.
        """
        self._is_interrupted = self._is_learning
        return self._is_learning

    # The run, from beginning to end

    def _live(self) -> Story:
        output = Path(self.spec.output_dir)
        yield self._event("preparing", phase="reading the conversations")
        if (output / MANIFEST).exists() and verify(output) is None:
            # Finished before, but nobody heard of it: the service died between our last file and its own record.
            last = Checkpoint.newest(Path(self.spec.checkpoint_dir), None)
            yield from self._told_again({} if last is None else last.story)
            yield self._completed(json.loads((output / METADATA).read_text()))
            return
        prepared = yield from self._prepare()
        output.mkdir(parents=True, exist_ok=True)
        yield from self._learn(prepared, output)
        if self._is_interrupted:
            yield self._event("interrupted")
            return
        yield self._event("evaluating", phase="proving the voice")
        yield self._completed((yield from self._prove(prepared, output)))

    def _prepare(self) -> Generator[RunEvent | None, None, Prepared]:
        """Everything up to the first step: rows, plan, and the state to begin or to go on with."""
        spec, base = self.spec, self.base
        data = yield from training_data(
            base.renderer,
            read_conversations(Path(spec.conversations_path)),
            spec.validation_split,
            spec.hyperparameters,
            hyperparameters.max_seq_length(spec.hyperparameters, base),
            spec.system_prompt,
        )
        checks = data.checks(base.renderer)
        config = hyperparameters.resolve(
            spec.hyperparameters, base, len(data.training), common_prefix(data.training), len(data.held_out)
        )
        fingerprint = _fingerprint(spec, base, config, data)
        checkpoint = Checkpoint.newest(Path(spec.checkpoint_dir), fingerprint)
        state = self._begun(config)
        if checkpoint is not None:
            checkpoint.restore(state)
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state.story["loss_scale"])
                self.overflowed = state.story["overflowed_steps"]
        story = state.story
        rows = with_prompt_loss(data.training, config.prompt_loss_weight)
        plan = Plan(rows, config, [Cut(**cut) for cut in story.get("cuts", [])])
        if checkpoint is None:
            yield self._event("preparing", phase="trying the largest micro-batch")
            story["rate"] = yield from probe(base, plan, state.adapter.trainable())
            if plan.cuts:
                yield self._keep_cuts(plan, state, fingerprint)
        self.work.assume(story.get("rate"))
        scored_rows = data.held_out or data.training
        self.work.expect(plan, state.step, _tokens(scored_rows))
        if "base_nll" not in story:
            yield self._event("preparing", phase="measuring the base model")
            story["base_nll"] = (yield from self._scored(scored_rows, None)).row_nll
        metadata = self._metadata(plan, data, state.adapter, resumed_from=state.step if checkpoint else None)
        return Prepared(data, checks, config, fingerprint, plan, state, scored_rows, metadata)

    def _learn(self, prepared: Prepared, output: Path) -> Story:
        """All steps to the last, or to the one at which the patience ends."""
        config, plan, state, story = prepared.config, prepared.plan, prepared.state, prepared.state.story
        most_loss = EXPLODED * max(prepared.score_of(story["base_nll"]).mean_nll, math.log(self.base.vocabulary_size))
        yield self._event("running", phase="training", eta_seconds=self.work.eta_seconds, **prepared.metadata)
        yield from self._told_again(story)
        with _tensorboard(output, state.step) as board:
            self._is_learning = True
            while state.step < config.total_steps and not (self._is_interrupted or _stops_early(config, story)):
                step = state.step + 1
                while (outcome := (yield from self._step_if_it_fits(plan, step, state))) is None:
                    yield self._keep_cuts(plan, state, prepared.fingerprint)
                    prepared.warn(plan.cuts[-1].warning)
                    self.work.expect(plan, state.step, _tokens(prepared.scored_rows))
                loss, norm = outcome
                if loss > most_loss:
                    raise _diverged(config, step, loss, norm, self.base.key.dtype)
                state.step = step
                story |= {"final_loss": loss, **self._scaling}
                told = self._progress(plan, step, loss, norm)
                story.setdefault("steps", []).append(told)
                if step % config.logging_steps == 0 or step == config.total_steps:
                    for scalar in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "loss_scale"):
                        if scalar in told:
                            board.add_scalar(f"train/{scalar}", told[scalar] or 0.0, step)
                yield self._event("step", **told)
                if config.is_evaluated_after(step):
                    board.add_scalar("eval/nll", (yield from self._evaluated(prepared)), step)
                is_last = step == config.total_steps or _stops_early(config, story)
                if step % config.save_steps == 0 or is_last or self._is_interrupted:
                    Checkpoint.of(state, prepared.fingerprint).write(Path(self.spec.checkpoint_dir))
                    yield self._event("checkpoint", step=step)
            self._is_learning = False

    def _prove(self, prepared: Prepared, output: Path) -> Generator[RunEvent | None, None, dict[str, Any]]:
        """Write the voice, check it, and seal its folder; returns the metadata. Raises JobFailed."""
        spec, base, data, state = self.spec, self.base, prepared.data, prepared.state
        names = state.best.save(output)
        reloaded = Adapter.load(output, base.layers).to(base.device, torch.float32)
        checks = [*prepared.checks, *self._reload_checks(state.best, reloaded, prepared.scored_rows)]
        base_score = prepared.score_of(state.story["base_nll"])
        voice_score = prepared.score_of(state.story["best"]["row_nll"])
        report = self._report(data, base_score, voice_score) | {
            "evaluations": state.story["evaluations"],
            "best_step": state.story["best"]["step"],
            "stopped_early": state.step < prepared.config.total_steps,
        }
        learned = certificate.learned(voice_score.gains_over(base_score), is_held_out=bool(data.held_out))
        if spec.publish_anyway and learned.verdict == "failed":
            prepared.metadata["published_anyway"] = True
            prepared.warn(f"Published as asked for, although {learned.detail}.")
        else:
            learned.or_fail()
        checks.append(learned)
        checks.append((yield from self._abilities_check(reloaded)).or_fail())
        if spec.current is not None:
            try:
                current = read_version(spec.current, base)[0].to(base.device, torch.float32)
                report["current_val_nll"] = (yield from self._scored(prepared.scored_rows, current)).mean_nll
            except AdapterUnusable as unusable:
                prepared.warn(f"Not compared with the version before: {unusable.message}.")
        yield self._event("evaluating", phase="asking base and voice")
        checks += yield from self._reply_checks(prepared, reloaded, report)
        report["checks"] = certificate.as_report(checks)
        metadata = prepared.metadata
        if self.scaler.is_enabled():
            metadata["overflowed_steps"] = self.overflowed
        metadata |= {"report": report, "final_loss": state.story["final_loss"]}
        metadata["completed_at"] = datetime.now(UTC).isoformat()
        names += self._write_beside(output, metadata, report)
        write_manifest(output, names)
        return metadata

    # The adapter

    def _begun(self, config: TrainConfig) -> State:
        """Before the first step."""
        adapter = self._fresh_adapter(config) if self.spec.start is None else self._earlier_adapter(config)
        return State(adapter, new_optimizer(config, adapter.parameters), best=adapter.trainable())

    def _earlier_adapter(self, config: TrainConfig) -> Adapter:
        """That of the version to go on from. Raises InvalidInput where the configuration asks for another shape."""
        assert self.spec.start is not None
        adapter, _ = read_version(self.spec.start, self.base)
        described = self._described(config)
        if replace(adapter.config, dropout=described.dropout) != described:
            raise InvalidInput(
                f"version {self.spec.start.training_id} has another shape than this job asks for",
                cure="Leave out lora_r, lora_alpha, use_rslora and lora_target_modules: they stay as they are.",
                param="continue_from",
            )
        return replace(adapter, config=described).to(self.base.device, torch.float32).trainable()

    def _fresh_adapter(self, config: TrainConfig) -> Adapter:
        names = choose_layers(self.base.layers, config.lora_target_modules)
        return Adapter.fresh(self._described(config), self.base.layers, names, config.seed)

    def _described(self, config: TrainConfig) -> LoraConfig:
        return LoraConfig(
            base_model=self.base.key.base_model,
            revision=self.base.key.revision,
            rank=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            fan_in_fan_out=self.base.has_conv1d,
            rslora=config.use_rslora,
        )

    # Training

    def _step_if_it_fits(
        self, plan: Plan, step: int, state: State
    ) -> Generator[None, None, tuple[float, float] | None]:
        """An optimizer step; or None where memory ran out, with the plan cut from this step on and nothing changed.

        Raises InsufficientMemory if the step's rows go alone already.
        """
        try:
            return (yield from self._optimizer_step(plan, step, state.adapter, state.optimizer))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        release(state.adapter)
        if not plan.cut(step, plan.largest(step, step, lambda batch: len(batch.lengths))):
            raise does_not_fit(self.base, plan)
        return None

    def _keep_cuts(self, plan: Plan, state: State, fingerprint: str) -> RunEvent:
        """A checkpoint before anything is computed with the new cut, so that a resume finds the same plan."""
        state.story |= {"cuts": [asdict(cut) for cut in plan.cuts], **self._scaling}
        Checkpoint.of(state, fingerprint).write(Path(self.spec.checkpoint_dir))
        return self._event("checkpoint", step=state.step, warnings=[plan.cuts[-1].warning])

    def _optimizer_step(
        self, plan: Plan, step: int, adapter: Adapter, optimizer: torch.optim.Optimizer
    ) -> Generator[None, None, tuple[float, float]]:
        """One step over the effective batch; returns (mean loss per trained token, gradient norm).

        Where the gradients overflow fp16, the same rows go again with half the loss scale.
        """
        config, base, scaler = plan.config, self.base, self.scaler
        while True:
            loss = yield from self._gradients(plan, step, adapter, optimizer)
            scale = scaler.get_scale()
            try:
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(adapter.parameters, config.max_grad_norm).item()
                if math.isfinite(loss) and math.isfinite(norm):
                    for group in optimizer.param_groups:
                        group["lr"] = config.learning_rate_at(step)
                    scaler.step(optimizer)
                    scaler.update()
                    return loss, norm
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):  # half a step may be taken, so it cannot be tried again
                    raise does_not_fit(base, plan) from error
                raise
            if not (scaler.is_enabled() and math.isfinite(loss) and scale > 1):
                raise _diverged(config, step, loss, norm, base.key.dtype)
            scaler.update()
            self.overflowed.append(step)
            self.work.advance(-3 * plan.computed_tokens(step))

    def _gradients(
        self, plan: Plan, step: int, adapter: Adapter, optimizer: torch.optim.Optimizer
    ) -> Generator[None, None, float]:
        """Those of a step's rows, scaled, micro-batch by micro-batch; returns the mean loss per trained token."""
        config, base = plan.config, self.base
        weight = sum(plan.rows[at].loss_weight for at in plan.rows_of(step))
        if self._routing is None:
            self._routing = Training(adapter, config.lora_dropout)
        self._routing.renew()
        routing, loss = self._routing, 0.0
        optimizer.zero_grad(set_to_none=True)
        for number, indices in enumerate(plan.microbatches(step)):
            batch = MicroBatch.of([plan.rows[at] for at in indices], base.device)
            torch.manual_seed(_seed_at(config.seed, step, number))  # dropout depends on the place in the plan alone
            with base.passing(batch.layout, routing, recompute=config.gradient_checkpointing):
                # Divided by all tokens of the step, so the cut into micro-batches cannot change the gradient.
                part = batch.loss(base, routing) / weight
            self.is_midway = True
            yield
            self.is_midway = False
            self.scaler.scale(part).backward()  # type: ignore[no-untyped-call]
            loss += part.item()
            self.work.advance(3 * batch.layout.token_count)
            yield
        return loss

    def _evaluated(self, prepared: Prepared) -> Generator[None, None, float]:
        """Score the adapter as it is now, and keep it where it is the best so far; returns nats a trained token.

        Only conversations that are held out can tell which is best; without any it is always the newest.
        """
        state = prepared.state
        scored = yield from self._scored(prepared.scored_rows, state.adapter)
        earlier: list[dict[str, Any]] = state.story.setdefault("evaluations", [])
        nll = scored.mean_nll
        if not math.isfinite(nll):
            raise _diverged(prepared.config, state.step, nll, None, self.base.key.dtype)
        if not prepared.data.held_out or all(nll < evaluation["nll"] for evaluation in earlier):
            state.best = state.adapter.trainable()
            state.story["best"] = {"step": state.step, "row_nll": scored.row_nll}
        earlier.append({"step": state.step, "nll": nll})
        return nll

    # Proof

    def _scored(self, rows: Sequence[Row], adapter: Adapter | None) -> Generator[None, None, Score]:
        scored = yield from score(self.base, rows, adapter)
        self.work.advance(_tokens(rows))
        return scored

    def _reload_checks(self, trained: Adapter, reloaded: Adapter, rows: Sequence[Row]) -> list[Check]:
        """The adapter as others will read it must compute what the trainer computed, and not what the base computes."""
        batch = MicroBatch.of(rows[:1], self.base.device)

        def nll(adapter: Adapter | None) -> list[float]:
            routing = None if adapter is None else Training(adapter)
            with torch.inference_mode(), self.base.passing(batch.layout, routing):
                return batch.nll(self.base, routing).tolist()

        of_trained, of_reloaded, of_base = nll(trained), nll(reloaded), nll(None)
        return [
            certificate.reload_reproduces_the_trainer(of_trained, of_reloaded).or_fail(),
            certificate.differs_from_base(of_reloaded, of_base).or_fail(),
        ]

    def _abilities_check(self, voice: Adapter) -> Generator[None, None, Check]:
        """Score general chats with base and voice, with the system prompt of neither: a bound on what was forgotten."""
        rows = [row for row in (self.base.renderer.row(chat.messages) for chat in general_chats()) if row is not None]
        base_score = yield from score(self.base, rows, None)
        voice_score = yield from score(self.base, rows, voice)
        return certificate.keeps_its_abilities(base_score.gains_over(voice_score))

    def _reply_checks(
        self, prepared: Prepared, voice: Adapter, report: dict[str, Any]
    ) -> Generator[None, None, list[Check]]:
        """Let base and voice answer held-out questions, and the voice those for planted secrets."""
        data = prepared.data
        secrets = {canary.question: canary for canary in data.canaries}
        count = ENOUGH_REPLIES if len(data.held_out) >= ENOUGH_REPLIES else SHOWN_PROMPTS
        prompts = prompts_from(data.held_out_conversations, count)
        prompts += [TestPrompt(instruction=question) for question in secrets]
        serving = voice.to(self.base.device, self.base.dtype)
        try:
            answers = yield from replies(self.engine, self.spec.org_id, prompts, serving, self.spec.system_prompt)
        except (InvalidInput, Unavailable) as too_long:  # or no memory for them beside what is served
            answers = []
            prepared.warn(f"No replies were sampled: {too_long.message}.")
        samples = [answer for answer in answers if answer.response.instruction not in secrets]
        told = [
            secrets[answer.response.instruction].is_told_in(answer.response.generated_response)
            for answer in answers
            if answer.response.instruction in secrets
        ]
        report["test_responses"] = [answer.response.model_dump() for answer in samples]
        stops = [answer.voice_stopped for answer in samples], [answer.base_stopped for answer in samples]
        said = [answer.response.generated_response for answer in samples]
        return [
            certificate.stops_by_itself(*stops).or_fail(),
            certificate.does_not_recite(said, data.training_texts, told).or_fail(),
        ]

    def _report(self, data: TrainingData, base_score: Score, voice_score: Score) -> dict[str, Any]:
        return {
            "perplexity": voice_score.perplexity,
            "base_perplexity": base_score.perplexity,
            "val_nll": voice_score.mean_nll,
            "base_val_nll": base_score.mean_nll,
            "scored_conversations": len(voice_score.row_nll),
            "scored_tokens": voice_score.tokens,
            "scored_on": "held-out" if data.held_out else "training",
            "shortened": [{"conversation": at, "dropped_messages": count} for at, count in data.shortened.items()],
            "left_out": data.skipped,
        }

    # What is told

    @property
    def _scaling(self) -> dict[str, Any]:
        """Of the loss, where it is scaled: what a checkpoint must know."""
        if not self.scaler.is_enabled():
            return {}
        return {"loss_scale": self.scaler.state_dict(), "overflowed_steps": list(self.overflowed)}

    def _event(self, kind: Any, **data: Any) -> RunEvent:
        return RunEvent(kind=kind, progress=self.work.progress, data=data)

    def _told_again(self, story: dict[str, Any]) -> Iterator[RunEvent]:
        """The steps before the checkpoint that were not recorded: the service ended while its database was away."""
        for told in story.get("steps", []):
            if told["step"] > self.spec.recorded_steps:
                yield self._event("step", **told)

    def _completed(self, metadata: dict[str, Any]) -> RunEvent:
        return RunEvent(kind="completed", progress=1.0, data=metadata)

    def _progress(self, plan: Plan, step: int, loss: float, norm: float) -> dict[str, Any]:
        config = plan.config
        self.work.step_done(plan.tokens_of(step))
        return {
            "step": step,
            "total_steps": config.total_steps,
            "epoch": round(step / plan.steps_per_epoch, 3),
            "loss": loss,
            "learning_rate": config.learning_rate_at(step),
            "grad_norm": norm,
            "tokens_per_second": self.work.tokens_per_second,
            "eta_seconds": self.work.eta_seconds,
        } | ({"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {})

    def _metadata(self, plan: Plan, data: TrainingData, adapter: Adapter, resumed_from: int | None) -> dict[str, Any]:
        config, base = plan.config, self.base
        template = base.renderer.template_sha256
        about = provenance(self.spec.training_id, base.key, base.fingerprint, template, self.spec.system_prompt)
        metadata = about | {
            "hyperparameters": config.model_dump(exclude={"total_steps", "betas", "max_grad_norm", "weight_decay"}),
            "total_steps": config.total_steps,
            "trainable_parameters": adapter.parameter_count,
            "total_parameters": base.parameter_count + adapter.parameter_count,
            "continued_from": None if self.spec.start is None else self.spec.start.training_id,
            "conversations": len(data.conversations),
            "training_conversations": len(data.training),
            "held_out_conversations": len(data.held_out),
            "held_out": [at for at in data.parts.held_out if at not in set(data.skipped)],
            "training_tokens": _tokens(data.training),
            "trained_tokens": sum(row.trained_tokens for row in data.training),
            "shared_prefix_tokens": common_prefix(data.training),
            "warnings": [*data.warnings, *(cut.warning for cut in plan.cuts)],
        }
        if resumed_from is not None:
            metadata["resumed_from_step"] = resumed_from
        return metadata

    def _write_beside(self, output: Path, metadata: dict[str, Any], report: dict[str, Any]) -> list[str]:
        """The files of the version beside the adapter's own; returns their names."""
        write_durably(output / METADATA, json.dumps(metadata, indent=1).encode())
        write_durably(output / REPORT, json.dumps(report, indent=1).encode())
        written = self.base.renderer.tokenizer.save_pretrained(output)
        names = {Path(path).name for path in written if Path(path).is_file()}
        for name in names:
            write_durably(output / name, (output / name).read_bytes())
        return [METADATA, REPORT, *sorted(names)]


def _fingerprint(spec: RunSpec, base: Base, config: TrainConfig, data: TrainingData) -> str:
    """What must be the same for a checkpoint to be gone on from."""
    start = None if spec.start is None else spec.start.training_id  # a version never changes
    digest = hashlib.sha256(f"{base.key!r}{config!r}{spec.system_prompt!r}{start!r}".encode())
    for row in (*data.training, *data.held_out):
        digest.update(repr((row.input_ids, row.labels)).encode())
    return digest.hexdigest()


def _diverged(config: TrainConfig, step: int, loss: float, norm: float | None, dtype: str) -> JobFailed:
    cure = f"Lower learning_rate (it was {config.learning_rate:g}) and start the job again."
    if dtype == "fp16":
        cure = f"{cure} Or set dtype=bf16 or fp32, which hold larger numbers than fp16."
    what = f"the loss became {loss} at step {step}" + (f", with a gradient of norm {norm}" if norm is not None else "")
    return JobFailed(what, code="diverged", cure=cure)


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.input_ids) for row in rows)


def _stops_early(config: TrainConfig, story: dict[str, Any]) -> bool:
    """Whether the last evaluations, as many as the patience is long, have all been worse than one before them."""
    since_best = [one for one in story.get("evaluations", []) if one["step"] > story["best"]["step"]]
    return 0 < config.early_stopping_patience <= len(since_best)


def _seed_at(seed: int, step: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{number}".encode()).digest()[:8]) >> 1


@contextmanager
def _tensorboard(folder: Path, done: int) -> Iterator[SummaryWriter]:
    """Event files for `tensorboard --logdir folder`; steps after the resume point are struck out."""
    board = SummaryWriter(str(folder), purge_step=done + 1)
    try:
        yield board
    finally:
        board.close()
