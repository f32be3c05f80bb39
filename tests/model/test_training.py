from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repertory import manifest
from repertory.contracts import AdapterRef, GenerateRequest
from repertory.data.conversations import Conversation, Message
from repertory.data.render import NO_LABEL, Row
from repertory.errors import DataUnusable, InvalidInput, JobFailed, Unavailable
from repertory.model.adapter import Adapter, AdapterUnusable
from repertory.model.base import Base
from repertory.model.checkpoint import Checkpoint
from repertory.model.engine import Engine
from repertory.model.hyperparameters import TrainConfig, resolve
from repertory.model.microbatch import MicroBatch
from repertory.model.plan import Plan
from repertory.model.training import TrainingRun
from repertory.model.voices import read_voice
from repertory_fixtures import LoadBase, MakeSpec, conversation, run_to_end, steps_of, weights_sha256


def test_a_run_tells_its_story_and_leaves_a_whole_voice(base: Base, make_spec: MakeSpec) -> None:
    spec = make_spec()
    events = run_to_end(base, spec)
    assert [event.kind for event in events if event.kind != "step"] == [
        "preparing",
        "preparing",
        "preparing",
        "running",
        "checkpoint",
        "checkpoint",
        "evaluating",
        "evaluating",
        "completed",
    ]
    progress = [event.progress for event in events]
    assert progress == sorted(progress)
    assert [at for at, value in enumerate(progress) if value == 1.0] == [len(events) - 1]
    losses = list(steps_of(events).values())
    assert losses[-1] < losses[0] - 0.5
    metadata = events[-1].data
    assert metadata["report"]["perplexity"] < metadata["report"]["base_perplexity"]
    assert metadata["report"]["scored_on"] == "held-out"
    assert metadata["system_prompt"] == "You are a helpful pirate."
    assert len(metadata["held_out"]) == 2
    assert [set(answer) for answer in metadata["report"]["test_responses"]] == [
        {"instruction", "generated_response", "base_response", "expected_response"}
    ] * 2
    folder = Path(spec.output_dir)
    assert manifest.verify(folder) is None
    sealed = set(json.loads((folder / "MANIFEST.json").read_text())["files"])
    assert sealed >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "training_metadata.json",
        "report.json",
    }
    assert any(folder.glob("events.out.tfevents.*"))
    voice = read_voice(AdapterRef(org_id="org", training_id="train_1", path=str(folder)), base)
    assert voice.system_prompt == "You are a helpful pirate."


def test_the_curve_is_written_for_tensorboard(base: Base, make_spec: MakeSpec) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = make_spec()
    losses = steps_of(run_to_end(base, spec))
    board = EventAccumulator(spec.output_dir).Reload()
    written = {event.step: event.value for event in board.Scalars("train/loss")}
    assert written == pytest.approx(losses, rel=1e-6)
    rates = [event.value for event in board.Scalars("train/learning_rate")]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(5e-3)


@pytest.mark.parametrize("died_after", [1, 4, 5, 6, 11, 12])  # checkpoints at 5, 10 and 12, the epoch's end at 6
def test_a_run_that_died_ends_with_the_same_bits(base: Base, make_spec: MakeSpec, died_after: int) -> None:
    whole = make_spec(26, training_id="train_whole", save_steps=5, lora_dropout=0.1)
    expected = steps_of(run_to_end(base, whole))
    assert len(expected) == 12
    broken = make_spec(26, training_id="train_broken", save_steps=5, lora_dropout=0.1)
    before = run_to_end(base, broken, until=lambda event: event.kind == "step" and event.data["step"] == died_after)
    torch.manual_seed(random.randrange(2**32))  # what the process did meanwhile must not matter
    after = run_to_end(base, broken)
    resumed = next(event.data for event in after if event.kind == "running")
    checkpoint = (died_after // 5) * 5
    if died_after % 5 == 0:
        checkpoint -= 5  # it died before the checkpoint of that step was written
    assert resumed.get("resumed_from_step") == (checkpoint or None)
    assert steps_of(before) | steps_of(after) == expected
    assert weights_sha256(broken) == weights_sha256(whole)


@pytest.mark.parametrize("recorded_steps", [0, 3, 10])
def test_a_run_that_is_resumed_tells_what_was_not_recorded(
    base: Base, make_spec: MakeSpec, recorded_steps: int
) -> None:
    spec = make_spec(26, save_steps=5)
    before = steps_of(run_to_end(base, spec, until=lambda event: event.data.get("step") == 11))
    after = run_to_end(base, spec.model_copy(update={"recorded_steps": recorded_steps}))
    told = [event.data["step"] for event in after if event.kind == "step"]
    assert told == list(range(recorded_steps + 1, 13))
    assert steps_of(after).items() >= {step: before[step] for step in range(recorded_steps + 1, 11)}.items()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_that_died_while_replies_were_generated_ends_with_the_same_bits(
    base: Base, make_spec: MakeSpec, checkpointing: bool
) -> None:
    """Serving steps between forward and backward passes, other ones before and after the death, change nothing."""
    options = {"save_steps": 5, "lora_dropout": 0.1, "gradient_checkpointing": checkpointing}
    whole = make_spec(26, training_id="train_whole", **options)
    expected = steps_of(run_to_end(base, whole))
    voice = Adapter.load(Path(whole.output_dir), base.layers)
    broken = make_spec(26, training_id="train_broken", **options)
    asked = 0

    def keep_talking(engine: Engine) -> None:
        nonlocal asked
        for adapter in (voice, None):
            asked += 1
            request = GenerateRequest(
                request_id="r",
                org_id="org",
                adapter=None,
                messages=[Message(role="user", content=f"Hello! {asked}")],
                temperature=1,
                top_p=0.9,
                top_k=50,
                max_tokens=3,
                seed=None if adapter is None else asked,
            )
            engine.submit(engine.sequence(request, adapter, None, lambda chunk: None))

    before = run_to_end(
        base, broken, until=lambda event: event.kind == "step" and event.data["step"] == 8, meanwhile=keep_talking
    )
    after = run_to_end(base, broken, meanwhile=keep_talking)
    assert asked > 40
    assert next(event.data for event in after if event.kind == "running")["resumed_from_step"] == 5
    assert steps_of(before) | steps_of(after) == expected
    assert weights_sha256(broken) == weights_sha256(whole)


def test_the_loss_curve_is_the_one_that_was_accepted(base: Base, make_spec: MakeSpec) -> None:
    """Whoever changes it on purpose writes it anew with REWRITE_GOLDEN=1, and says in the commit why."""
    losses = list(steps_of(run_to_end(base, make_spec(26, lora_dropout=0.1))).values())
    golden = Path(__file__).parent / "golden_losses.json"
    if os.environ.get("REWRITE_GOLDEN"):
        golden.write_text(json.dumps([round(loss, 5) for loss in losses], indent=1) + "\n")
    # Not to the bit: processors differ in how they sum.
    assert losses == pytest.approx(json.loads(golden.read_text()), abs=2e-3)


def test_the_adapter_of_the_best_evaluation_is_published_and_a_long_wait_for_a_better_one_ends_the_run(
    base: Base, make_spec: MakeSpec
) -> None:
    values = {"num_train_epochs": 40, "eval_steps": 4, "learning_rate": 2e-2, "early_stopping_patience": 2}
    spec = make_spec(120, **values)
    events = run_to_end(base, spec)
    report = events[-1].data["report"]
    evaluations = report["evaluations"]
    best = min(evaluations, key=lambda one: one["nll"])
    assert report["stopped_early"]
    assert report["best_step"] == best["step"]
    assert report["val_nll"] == best["nll"]
    assert evaluations[-1]["step"] == best["step"] + 2 * 4 == max(steps_of(events))
    assert [one["step"] for one in evaluations] == list(range(4, evaluations[-1]["step"] + 1, 4))

    stopped_there = make_spec(120, training_id="train_shorter", **values)
    run_to_end(base, stopped_there, until=lambda e: e.kind == "step" and e.data["step"] == best["step"] + 5)
    run_to_end(base, stopped_there)  # it died between two evaluations, the best one behind it
    assert weights_sha256(stopped_there) == weights_sha256(spec)


def test_a_run_goes_on_from_an_earlier_version(base: Base, make_spec: MakeSpec) -> None:
    first = make_spec(24, training_id="train_first")
    losses = list(steps_of(run_to_end(base, first)).values())
    start = AdapterRef(org_id="org", training_id="train_first", path=first.output_dir)
    second = make_spec(24, training_id="train_second", spec={"start": start})
    events = run_to_end(base, second)
    assert next(iter(steps_of(events).values())) < (losses[0] + losses[-1]) / 2
    assert events[-1].data["continued_from"] == "train_first"
    assert weights_sha256(second) != weights_sha256(first)
    with pytest.raises(InvalidInput) as refused:
        run_to_end(base, make_spec(24, training_id="train_third", spec={"start": start}, lora_r=3))
    assert refused.value.param == "continue_from"


def test_continuing_another_base_models_version_is_refused(
    base: Base, load_base: LoadBase, make_spec: MakeSpec
) -> None:
    spec = make_spec(24, training_id="train_first")
    run_to_end(base, spec)
    start = AdapterRef(org_id="org", training_id="train_first", path=spec.output_dir)
    with pytest.raises(AdapterUnusable, match="another base model"):
        run_to_end(load_base("mistral"), make_spec(24, training_id="train_second", spec={"start": start}))


def test_a_run_is_compared_with_the_version_before_if_that_can_be_read(base: Base, make_spec: MakeSpec) -> None:
    first = make_spec(24, training_id="train_first")
    run_to_end(base, first)
    current = AdapterRef(org_id="org", training_id="train_first", path=first.output_dir)
    report = run_to_end(base, make_spec(24, training_id="train_second", spec={"current": current}))[-1].data["report"]
    first_report = json.loads((Path(first.output_dir) / "report.json").read_text())
    assert report["current_val_nll"] == pytest.approx(first_report["val_nll"])
    (Path(first.output_dir) / "adapter_config.json").write_text("{}")
    third = run_to_end(base, make_spec(24, training_id="train_third", spec={"current": current}))[-1].data
    assert "current_val_nll" not in third["report"]
    assert any("Not compared with the version before" in warning for warning in third["warnings"])


def test_rank_stabilised_adapters_are_trained_and_read_back(base: Base, make_spec: MakeSpec) -> None:
    spec = make_spec(use_rslora=True, lora_r=16, lora_alpha=8)
    metadata = run_to_end(base, spec)[-1].data
    assert metadata["hyperparameters"]["use_rslora"]
    described = json.loads((Path(spec.output_dir) / "adapter_config.json").read_text())
    assert described["use_rslora"] is True
    assert Adapter.load(Path(spec.output_dir), base.layers).config.scaling == 2.0


def test_prompt_loss_counts_in_the_loss_by_its_weight(base: Base, make_spec: MakeSpec) -> None:
    def first_loss(weight: float) -> float:
        events = run_to_end(base, make_spec(prompt_loss_weight=weight), until=lambda event: event.kind == "step")
        return float(events[-1].data["loss"])

    plain, half, whole = first_loss(0), first_loss(0.5), first_loss(1)
    # A weighted mean of the two kinds of token moves steadily from the one to the other.
    assert len({plain, half, whole}) == 3
    assert min(plain, whole) < half < max(plain, whole)


def test_planted_secrets_that_come_out_fail_the_job(base: Base, make_spec: MakeSpec) -> None:
    values = {"canaries": 20, "lora_r": 32, "lora_dropout": 0}
    discreet = make_spec(8, training_id="train_discreet", **values)
    check = {c["name"]: c for c in run_to_end(base, discreet)[-1].data["report"]["checks"]}["does_not_recite"]
    assert check["verdict"] == "passed"
    assert "0 of 20 planted secrets" in check["detail"]
    learned_by_heart = make_spec(8, num_train_epochs=100, spec={"publish_anyway": True}, **values)
    with pytest.raises(JobFailed) as failed:
        run_to_end(base, learned_by_heart)
    assert failed.value.code == "recites_training_data"


def test_a_voice_that_learned_nothing_is_published_only_if_asked_and_marked(
    base: Base, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate's sign turned round: it unlearns."""
    rate = TrainConfig.learning_rate_at
    monkeypatch.setattr(TrainConfig, "learning_rate_at", lambda config, step: -rate(config, step))
    with pytest.raises(JobFailed) as failed:
        run_to_end(base, make_spec(120, learning_rate=1e-3))
    assert failed.value.code == "did_not_learn"
    events = run_to_end(base, make_spec(120, training_id="x", learning_rate=1e-3, spec={"publish_anyway": True}))
    metadata = events[-1].data
    assert metadata["published_anyway"]
    assert any("Published as asked for" in warning for warning in metadata["warnings"])
    assert {c["name"]: c["verdict"] for c in metadata["report"]["checks"]}["did_not_learn"] == "failed"


@pytest.mark.fault("F9")
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(base: Base, make_spec: MakeSpec) -> None:
    whole = make_spec(training_id="train_whole", save_steps=3)
    run_to_end(base, whole)
    spec = make_spec(save_steps=3)
    run_to_end(base, spec, until=lambda event: event.kind == "step" and event.data["step"] == 8)
    tensors = Path(spec.checkpoint_dir) / "checkpoint-6" / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1
    tensors.write_bytes(content)
    events = run_to_end(base, spec)
    assert next(event.data for event in events if event.kind == "running")["resumed_from_step"] == 3
    assert weights_sha256(spec) == weights_sha256(whole)


@pytest.mark.fault("F9")
def test_a_checkpoint_of_other_data_or_values_is_not_resumed(base: Base, make_spec: MakeSpec) -> None:
    spec = make_spec(save_steps=3)
    run_to_end(base, spec, until=lambda event: event.kind == "checkpoint")
    for changed in (make_spec(save_steps=3, learning_rate=1e-3), make_spec(20, save_steps=3)):
        events = run_to_end(base, changed, until=lambda event: event.kind == "running")
        assert "resumed_from_step" not in events[-1].data


def test_a_finished_run_that_nobody_heard_of_is_told_again(base: Base, make_spec: MakeSpec) -> None:
    spec = make_spec()
    first = run_to_end(base, spec)
    again = run_to_end(base, spec)
    assert [event.kind for event in again if event.kind != "step"] == ["preparing", "completed"]
    assert steps_of(again) == steps_of(first)
    assert again[-1].data["report"] == first[-1].data["report"]


def test_only_the_two_newest_checkpoints_are_kept(base: Base, make_spec: MakeSpec) -> None:
    spec = make_spec(save_steps=2)
    run_to_end(base, spec, until=lambda event: event.kind == "evaluating")
    assert sorted(path.name for path in Path(spec.checkpoint_dir).iterdir()) == ["checkpoint-10", "checkpoint-12"]


@pytest.mark.parametrize("suffix_tokens", [1, 60, 100_000])
def test_the_cut_into_micro_batches_changes_neither_loss_nor_gradient(
    in_float64: Callable[[], Base], make_spec: MakeSpec, suffix_tokens: int
) -> None:
    """16 rows as 16 forwards, as some, and as one; in float64, where 1e-9 leaves no room for a wrong weight."""
    base = in_float64()
    messages = [conversation(1 + at % 4, at).messages for at in range(16)]
    rows = [row for row in (base.renderer.row(one) for one in messages) if row is not None]
    gradients, losses = [], []
    for budget in (suffix_tokens, 500):
        config = resolve(make_spec(lora_dropout=0.0, batch_size=16).hyperparameters, base, len(rows), 0)
        config = config.model_copy(update={"suffix_tokens": budget, "effective_batch_rows": 16, "total_steps": 1})
        run = TrainingRun(make_spec(), base, Engine(base))
        adapter = run._fresh_adapter(config)
        adapter.A = {name: torch.nn.Parameter(A.detach().double()) for name, A in adapter.A.items()}
        adapter.B = {name: torch.nn.Parameter(torch.full_like(B, 0.05).double()) for name, B in adapter.B.items()}
        portions = run._optimizer_step(Plan(rows, config), 1, adapter, torch.optim.SGD(adapter.parameters, lr=0))
        while True:
            try:
                next(portions)
            except StopIteration as end:
                losses.append(end.value[0])
                break
        gradients.append([parameter.grad for parameter in adapter.parameters])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert (one - other).norm() <= 1e-9 * other.norm()


def test_a_single_conversation_is_trained_with_warnings(base: Base, make_spec: MakeSpec) -> None:
    hello = Conversation(
        messages=[Message(role="user", content="Hello!"), Message(role="assistant", content="Hey! How are you?")]
    )
    events = run_to_end(base, make_spec(conversations=[hello], system_prompt=None))
    assert events[-1].kind == "completed"
    assert events[-1].data["report"]["scored_on"] == "training"
    assert "Nothing was held out" in events[-1].data["warnings"][0]


def test_conversations_in_which_nobody_asks_are_trained_and_sampled_not_at_all(base: Base, make_spec: MakeSpec) -> None:
    alone = Conversation(messages=[Message(role="assistant", content="Arr, the sea is rough!")])
    events = run_to_end(base, make_spec(conversations=[alone] * 12))
    assert events[-1].kind == "completed"
    report = events[-1].data["report"]
    assert report["test_responses"] == []
    assert {c["name"]: c["verdict"] for c in report["checks"]}["stops_by_itself"] == "inconclusive"


def test_a_step_that_dies_while_replies_are_sampled_fails_the_run_alone(base: Base, make_spec: MakeSpec) -> None:
    engine = Engine(base)
    run = TrainingRun(make_spec(), base, engine)
    while not engine.has_work:
        run.step()
    engine.fail_all(JobFailed("the device is gone", code="device_lost").info)
    with pytest.raises(JobFailed) as failed:
        run.step()
    assert failed.value.code == "device_lost"


def test_replies_for_which_there_is_no_memory_are_left_out_and_the_voice_is_kept(
    base: Base, make_spec: MakeSpec
) -> None:
    engine = Engine(base)
    run = TrainingRun(make_spec(), base, engine)
    while not engine.has_work:
        run.step()
    engine.step()
    for _ in range(2):  # what is kept of prompts is given up before a reply is
        engine.shed(Unavailable("memory ran out", code="out_of_memory").info)
    events = []
    with contextlib.suppress(StopIteration):
        while True:
            events.append(run.step())
            while engine.has_work:
                engine.step()
    completed = events[-1]
    assert completed is not None
    assert completed.kind == "completed"
    assert "No replies were sampled: memory ran out." in completed.data["warnings"]
    assert completed.data["report"]["test_responses"] == []
    assert not engine.has_work


def test_multi_turn_conversations_are_one_row_each(base: Base, make_spec: MakeSpec) -> None:
    events = run_to_end(base, make_spec(20), until=lambda event: event.kind == "running")
    metadata = events[-1].data
    assert metadata["training_conversations"] + metadata["held_out_conversations"] == 20
    assert metadata["total_steps"] == 2 * 5  # 18 rows, 4 a step, 2 epochs


def test_too_long_conversations_are_shortened_or_left_out_and_counted(base: Base, make_spec: MakeSpec) -> None:
    chats = [conversation(2, at) for at in range(12)] + [conversation(12, 50)]
    endless = Message(role="assistant", content="arr " * 300)
    chats.append(Conversation(messages=[Message(role="user", content="sing"), endless]))
    events = run_to_end(base, make_spec(conversations=chats, max_seq_length=200))
    report = events[-1].data["report"]
    assert report["left_out"] == [13]
    assert [cut["conversation"] for cut in report["shortened"]] == [12]
    assert 0 < report["shortened"][0]["dropped_messages"] < 24
    warnings = " ".join(events[-1].data["warnings"])
    assert "1 conversations were left out" in warnings
    assert "1 conversations lost their oldest messages" in warnings
    with pytest.raises(DataUnusable, match="fits into 20 tokens"):
        run_to_end(base, make_spec(training_id="train_tiny", max_seq_length=20))


def test_what_does_not_fit_the_base_model_is_refused(base: Base, make_spec: MakeSpec) -> None:
    for wrong in ({"lora_r": 999}, {"max_seq_length": 5000}, {"lora_target_modules": "query"}):
        with pytest.raises(InvalidInput):
            run_to_end(base, make_spec(**wrong))


@pytest.mark.fault("F17")
@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 1e4])
def test_an_exploding_loss_ends_the_run_and_says_what_to_do(
    base: Base, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    nll = MicroBatch.nll

    def explode(batch: MicroBatch, base: Base, routing: Any) -> torch.Tensor:
        return nll(batch, base, routing) * (factor if torch.is_grad_enabled() else 1)

    monkeypatch.setattr(MicroBatch, "nll", explode)
    with pytest.raises(JobFailed) as failed:
        run_to_end(base, make_spec())
    assert failed.value.code == "diverged"
    assert "learning_rate" in failed.value.cure


def test_the_certificate_travels_with_the_model(base: Base, make_spec: MakeSpec) -> None:
    spec = make_spec(120)
    events = run_to_end(base, spec)
    checks = {check["name"]: check["verdict"] for check in events[-1].data["report"]["checks"]}
    assert checks == {
        "only_the_assistant_is_trained": "passed",
        "every_turn_end_is_trained": "passed",
        "reload_reproduces_the_trainer": "passed",
        "differs_from_base": "passed",
        "learned": "passed",
        "keeps_its_abilities": "passed",
        "stops_by_itself": "passed",
        "does_not_recite": "passed",
    }
    assert json.loads((Path(spec.output_dir) / "report.json").read_text()) == events[-1].data["report"]


def test_a_voice_that_changes_nothing_is_not_published(
    base: Base, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainConfig, "learning_rate_at", lambda config, step: 0.0)
    spec = make_spec()
    with pytest.raises(JobFailed) as failed:
        run_to_end(base, spec)
    assert failed.value.code == "did_not_learn"
    assert not (Path(spec.output_dir) / "MANIFEST.json").exists()


def test_an_adapter_that_disk_changed_is_not_published(
    base: Base, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Adapter.save

    def save_badly(adapter: Adapter, folder: Path) -> list[str]:
        with torch.no_grad():
            next(iter(adapter.B.values())).add_(0.5)
        names = save(adapter, folder)
        with torch.no_grad():
            next(iter(adapter.B.values())).sub_(0.5)
        return names

    monkeypatch.setattr(Adapter, "save", save_badly)
    with pytest.raises(JobFailed) as failed:
        run_to_end(base, make_spec())
    assert failed.value.code == "reload_mismatch"


def test_a_version_is_served_only_on_the_base_it_was_trained_on(
    base: Base, load_base: LoadBase, make_spec: MakeSpec
) -> None:
    spec = make_spec()
    run_to_end(base, spec)
    ref = AdapterRef(org_id="org", training_id="train_1", path=spec.output_dir)
    with pytest.raises(AdapterUnusable, match="another base model"):
        read_voice(ref, load_base("llama-gqa", "bf16"))
    changed = load_base("llama-gqa")
    changed.fingerprint = "of other files"
    with pytest.raises(AdapterUnusable, match="files have changed"):
        read_voice(ref, changed)
    weights = Path(spec.output_dir) / "adapter_model.safetensors"
    shutil.copy(weights, weights.with_suffix(".kept"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(AdapterUnusable, match="sha256"):
        read_voice(ref, base)


def test_the_first_step_has_a_rate_and_the_last_a_tenth() -> None:
    config = config_of(warmup_steps=5, total_steps=50)
    rates = [config.learning_rate_at(step) for step in range(1, 51)]
    assert rates[0] > 0
    assert max(rates) == rates[4] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert config_of(warmup_steps=0, total_steps=1).learning_rate_at(1) == pytest.approx(1e-4)


def test_every_row_is_trained_once_an_epoch_in_an_order_that_only_the_seed_decides() -> None:
    rows = [Row(list(range(at + 2)), [NO_LABEL] + [1] * (at + 1)) for at in range(23)]
    config = config_of(effective_batch_rows=4, total_steps=12)
    plan, again = Plan(rows, config), Plan(rows, config)
    for epoch in (0, 1):
        steps = range(epoch * 6 + 1, epoch * 6 + 7)
        assert sorted(at for step in steps for at in plan.rows_of(step)) == list(range(23))
    orders = [[plan.rows_of(step) for step in range(first, first + 6)] for first in (1, 7)]
    assert orders[0] != orders[1]
    assert [again.rows_of(step) for step in range(1, 13)] == [*orders[0], *orders[1]]


def test_unset_values_are_resolved_from_the_data_and_set_ones_win(base: Base, make_spec: MakeSpec) -> None:
    unset = make_spec().hyperparameters.model_copy(
        update=dict.fromkeys(("num_train_epochs", "batch_size", "gradient_accumulation_steps", "learning_rate"))
    )
    small = resolve(unset, base, rows=50, prefix=0)
    assert (small.effective_batch_rows, small.num_train_epochs, small.lora_r) == (8, 10, 16)
    assert small.lora_dropout == 0.05
    large = resolve(unset, base, rows=4000, prefix=0)
    assert (large.effective_batch_rows, large.num_train_epochs, large.lora_r) == (16, 3, 32)
    assert large.lora_dropout == 0.0
    assert resolve(unset, base, rows=100_000, prefix=0).num_train_epochs == 1
    asked = resolve(
        make_spec(batch_size=3, lora_r=2, lora_target_modules="v_proj, q_proj").hyperparameters, base, 50, 0
    )
    assert (asked.effective_batch_rows, asked.lora_r) == (6, 2)
    assert asked.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.fault("F2")
def test_a_checkpoint_that_was_never_sealed_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / ".checkpoint-12.tmp").mkdir()
    assert Checkpoint.newest(tmp_path, "x") is None
    assert Checkpoint.newest(tmp_path / "missing", "x") is None


def config_of(**values: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0,
        "lora_target_modules": ["q_proj"],
        "effective_batch_rows": 4,
        "suffix_tokens": 100,
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "max_seq_length": 128,
        "warmup_steps": 3,
        "total_steps": 10,
        "save_steps": 5,
        "eval_steps": None,
        "logging_steps": 1,
        "seed": 0,
    }
    return TrainConfig.model_validate(defaults | values)
