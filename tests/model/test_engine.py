from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from repertory.contracts import AdapterRef, GenerateRequest, TokenChunk
from repertory.data.conversations import Message
from repertory.errors import ErrorInfo, InvalidInput
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.base import Base
from repertory.model.engine import Engine
from repertory.model.prefixes import BLOCK_TOKENS
from repertory.model.scheduler import Sequence

QUESTIONS = ["Hello!", "Tell me a joke about the weather and about music " * 4, "ok", "coffee or tea?" * 9, "home"]


def adapter_of(base: Base, seed: int, rank: int = 4) -> Adapter:
    short = sorted({name.rsplit(".", 1)[-1] for name in base.layers})
    config = LoraConfig(base_model="x", rank=rank, alpha=8, dropout=0, target_modules=short)
    adapter = Adapter.fresh(config, base.layers, list(base.layers), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for B in adapter.B.values():
            B.copy_(torch.randn_like(B) * 0.2)
    return adapter.to(base.device, base.dtype)


def ask(
    engine: Engine, question: str, adapter: Adapter | None, told: list[TokenChunk] | None = None, /, **asked: Any
) -> Sequence:
    values: dict[str, Any] = {"temperature": 0, "top_p": 1, "top_k": 0, "max_tokens": 12, "adapter": None}
    system = [Message(role="system", content=asked.pop("system"))] if "system" in asked else []
    request = GenerateRequest(
        request_id="r",
        org_id=asked.pop("org_id", "org"),
        messages=[*system, Message(role="user", content=question)],
        **(values | asked),
    )
    sequence = engine.sequence(request, adapter, None, (told if told is not None else []).append)
    sequence.stop_ids = set()
    engine.submit(sequence)
    return sequence


def drain(engine: Engine, limit: int = 1000) -> None:
    for _ in range(limit):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("the engine did not come to an end")


def test_a_reply_is_the_same_whoever_else_is_in_the_batch(base: Base) -> None:
    """fp32, sampled with a seed: the batch changes rounding in the last bits, not which token is drawn."""
    alone_engine, crowd_engine = Engine(base), Engine(base)
    crowd_engine.scheduler.step_tokens = 16
    how: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 7}
    alone = ask(alone_engine, "Hello!", adapter_of(base, 1), **how)
    drain(alone_engine)
    for at in range(5):
        ask(crowd_engine, QUESTIONS[at], adapter_of(base, at), org_id=f"o{at}")
    in_crowd = ask(crowd_engine, "Hello!", adapter_of(base, 1), **how)
    drain(crowd_engine)
    assert in_crowd.output_ids == alone.output_ids


def test_seeds_differ_and_repeat(base: Base) -> None:
    def reply(seed: int) -> list[int]:
        engine = Engine(base)
        sequence = ask(engine, "Hello!", None, temperature=1.5, seed=seed, max_tokens=20)
        drain(engine)
        return sequence.output_ids

    assert reply(1) == reply(1)
    assert reply(1) != reply(2)


def test_top_k_of_one_is_greedy_and_tiny_top_p_too(base: Base) -> None:
    engine = Engine(base)
    greedy = ask(engine, "ok", None)
    by_k = ask(engine, "ok", None, temperature=2.0, top_k=1)
    by_p = ask(engine, "ok", None, temperature=0.5, top_p=1e-6)
    drain(engine)
    assert greedy.output_ids == by_k.output_ids == by_p.output_ids


def test_a_temperature_too_small_to_divide_by_is_greedy(base: Base) -> None:
    engine = Engine(base)
    greedy = ask(engine, "ok", None)
    coldest = ask(engine, "ok", None, temperature=1e-308)
    drain(engine)
    assert coldest.output_ids == greedy.output_ids


def test_a_voice_whose_weights_overflow_does_not_disturb_the_others(base: Base) -> None:
    engine = Engine(base)
    alone = ask(engine, "ok", None, temperature=0.9, seed=3)
    drain(engine)
    broken = adapter_of(base, 1)
    for A in broken.A.values():
        A.fill_(float("nan"))
    beside = ask(engine, "ok", None, temperature=0.9, seed=3)
    ask(engine, "ok", broken, temperature=0.9)
    drain(engine)
    assert beside.output_ids == alone.output_ids


def test_a_sequence_stops_at_the_turn_end_and_at_a_stop_string(base: Base) -> None:
    engine = Engine(base)
    free = ask(engine, "Hello!", None)
    drain(engine)
    text = base.renderer.decode(free.output_ids)
    told: list[TokenChunk] = []
    ended = ask(engine, "Hello!", None, told)
    end = free.output_ids[6]
    ended.stop_ids = {end}
    drain(engine)
    assert ended.output_ids == free.output_ids[: free.output_ids.index(end) + 1]
    assert told[-1].finish_reason == "stop"
    told.clear()
    ask(engine, "Hello!", None, told, stop=[text[5:8]])
    drain(engine)
    assert "".join(chunk.text for chunk in told) == text[: text.find(text[5:8])]


def test_a_raw_prompt_is_continued_as_transformers_continues_it(base: Base, cache: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(cache / "tiny/llama-gqa", attn_implementation="eager")
    engine = Engine(base)
    told: list[TokenChunk] = []
    request = GenerateRequest(
        request_id="r",
        org_id="org",
        adapter=None,
        prompt="Hello! Hey, how",
        temperature=0,
        top_p=1,
        top_k=0,
        max_tokens=12,
    )
    sequence = engine.sequence(request, None, "a recorded system prompt", told.append)
    sequence.stop_ids = set()
    engine.submit(sequence)
    drain(engine)
    ids = base.renderer.tokenizer(request.prompt, return_tensors="pt")["input_ids"]
    assert sequence.prompt_ids == ids[0].tolist()
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0]
    assert sequence.output_ids == expected[ids.shape[1] :].tolist()
    whole = base.renderer.tokenizer.decode(expected, skip_special_tokens=True)
    assert request.prompt + "".join(chunk.text for chunk in told) == whole


def test_logprobs_are_those_of_the_model_whatever_is_sampled(base: Base, cache: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(cache / "tiny/llama-gqa", attn_implementation="eager")
    engine = Engine(base)
    told: list[TokenChunk] = []
    sequence = ask(engine, "Hello!", None, told, temperature=1.2, top_k=9, seed=5, top_logprobs=3)
    without: list[TokenChunk] = []
    ask(engine, "Hello!", None, without)
    drain(engine)
    assert not any(chunk.logprobs for chunk in without)
    scores = [score for chunk in told for score in chunk.logprobs]
    ids = torch.tensor([sequence.prompt_ids + sequence.output_ids])
    with torch.inference_mode():
        expected_NV = theirs(ids).logits[0, len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)
    assert len(scores) == len(sequence.output_ids)
    for score, token, expected_V in zip(scores, sequence.output_ids, expected_NV, strict=True):
        assert score.logprob == pytest.approx(float(expected_V[token]), abs=1e-3)
        assert score.token == base.renderer.token_text(token)
        values, tokens = expected_V.topk(3)
        assert [one.logprob for one in score.top] == pytest.approx(values.tolist(), abs=1e-3)
        assert [one.token for one in score.top] == [base.renderer.token_text(int(one)) for one in tokens]


def test_the_tokens_of_a_stop_string_are_not_told_either(base: Base) -> None:
    engine = Engine(base)

    def reply(**asked: Any) -> list[TokenChunk]:
        told: list[TokenChunk] = []
        ask(engine, "Hello!", None, told, temperature=1, seed=3, max_tokens=24, top_logprobs=0, **asked)
        drain(engine)
        return told

    tokens = [score.token for chunk in reply() for score in chunk.logprobs]
    assert len(tokens) == 24
    stop = next(token for token in tokens[6:] if token.isalpha())
    stopped = reply(stop=[stop])
    assert stopped[-1].finish_reason == "stop"
    told = [score.token for chunk in stopped for score in chunk.logprobs]
    assert 0 < len(told) <= tokens.index(stop)
    assert told == tokens[: len(told)]
    assert stop not in "".join(told)


def test_cancelling_frees_the_row_and_leaves_the_others_alone(base: Base) -> None:
    engine = Engine(base)
    expected = ask(engine, "Hello!", None, max_tokens=20)
    drain(engine)
    sequences = [ask(engine, "Hello!", None, max_tokens=20, org_id=f"o{at}") for at in range(4)]
    for _ in range(7):
        engine.step()
    engine.cancel(sequences[0])
    engine.cancel(sequences[2])
    assert len(engine.scheduler.running) == 2
    drain(engine)
    assert sequences[1].output_ids == sequences[3].output_ids == expected.output_ids


def test_a_cancelled_prompt_in_the_middle_of_its_prefill_leaves_the_others_alone(base: Base) -> None:
    engine = Engine(base)
    engine.scheduler.step_tokens = 16
    expected = ask(engine, "Hello!", None, max_tokens=20)
    drain(engine)
    first = ask(engine, "Hello!", None, max_tokens=20)
    for _ in range(4):
        engine.step()
    given_up = ask(engine, "word " * 60, None)
    for _ in range(3):
        engine.step()
    engine.cancel(given_up)
    later = ask(engine, "Hello!", None, max_tokens=20)
    drain(engine)
    assert first.output_ids == later.output_ids == expected.output_ids


PERSONA = "You are a helpful pirate who talks of music and of the weather, and likes coffee more than tea. " * 15


def version(org_id: str, training_id: str) -> AdapterRef:
    return AdapterRef(org_id=org_id, training_id=training_id, path="/nowhere")


@pytest.fixture
def computed(base: Base, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens went through the base model, pass by pass."""
    counts: list[int] = []
    hidden = Base.hidden

    def counting(self: Base, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        counts.append(len(ids))
        return hidden(self, ids, positions)

    monkeypatch.setattr(Base, "hidden", counting)
    return counts


def test_a_personas_system_prompt_is_computed_once_for_each_version(base: Base, computed: list[int]) -> None:
    """The first reply's first token costs the whole prompt, the second's what is its own of it."""
    engine, voice = Engine(base), adapter_of(base, 1)

    def prompt_cost(question: str, voice: Adapter | None, **asked: Any) -> tuple[Sequence, int]:
        computed.clear()
        sequence = ask(engine, question, voice, system=PERSONA, max_tokens=1, **asked)
        drain(engine)
        return sequence, sum(computed)

    first, first_cost = prompt_cost("Hello!", voice, adapter=version("org", "train_1"))
    second, second_cost = prompt_cost("And how is the weather?", voice, adapter=version("org", "train_1"))
    assert first_cost == len(first.prompt_ids) > 500
    assert second_cost == len(second.prompt_ids) - second.reused_tokens < 0.1 * first_cost
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == second.reused_tokens
    for org_id, training_id in (("org", "train_2"), ("other", "train_1")):
        again, cost = prompt_cost("Hello!", voice, org_id=org_id, adapter=version(org_id, training_id))
        assert cost == len(again.prompt_ids)
    for org_id in ("org", "other"):  # over the bare base organisations share nothing either
        again, cost = prompt_cost("Hello!", None, org_id=org_id)
        assert cost == len(again.prompt_ids)
        assert prompt_cost("Good morning!", None, org_id=org_id)[1] < 0.1 * cost
    for _ in range(2):  # an adapter that is no version yet, under evaluation, is not the bare base
        tried, cost = prompt_cost("Hello!", voice)
        assert cost == len(tried.prompt_ids)


def test_replies_are_the_same_whether_their_beginning_was_computed_or_found(base: Base) -> None:
    """fp32: mixed voices and the base, greedy and sampled, with prompts that come together and one after the other."""
    voices = {"train_1": adapter_of(base, 1), "train_2": adapter_of(base, 2), None: None}

    def replies(engine: Engine) -> list[list[int]]:
        said = []
        for question in ("Hello!", "ok", "Hello! What do you like to do?"):
            for training_id, voice in voices.items():
                ref = version("org", training_id) if training_id else None
                how: dict[str, Any] = {"system": PERSONA, "adapter": ref}
                said.append(ask(engine, question, voice, **how))
                said.append(ask(engine, question, voice, temperature=0.9, seed=len(said), **how))
            drain(engine)
        return [one.output_ids for one in said]

    with_cache, without = Engine(base), Engine(base)
    without.prefixes.most_bytes = 0
    assert replies(with_cache) == replies(without)
    assert with_cache.prefixes.held_bytes > 0


def test_prompts_that_begin_alike_and_come_together_compute_their_beginning_once(
    base: Base, computed: list[int]
) -> None:
    engine, voice = Engine(base), adapter_of(base, 1)
    questions = ["Hello!", "ok", "good morning", "How are you?"]
    sequences = [
        ask(engine, question, voice, system=PERSONA, adapter=version("org", "train_1"), max_tokens=1)
        for question in questions
    ]
    drain(engine)
    own = [len(one.prompt_ids) - one.reused_tokens for one in sequences]
    assert sum(computed) == sum(own) < len(sequences[0].prompt_ids) + 200


def test_an_unloaded_version_leaves_nothing_in_the_prefix_cache(base: Base) -> None:
    engine, voice = Engine(base), adapter_of(base, 1)
    ref = version("org", "train_1")
    ask(engine, "Hello!", voice, system=PERSONA, adapter=ref)
    ask(engine, "Hello! " * 10, None)
    drain(engine)
    whole = engine.prefixes.held_bytes
    in_flight = ask(engine, "Something else. " * 30, voice, system=PERSONA, adapter=ref)
    engine.step()
    engine.forget("org", "train_1")
    drain(engine)
    assert len(in_flight.output_ids) == 12
    assert 0 < engine.prefixes.held_bytes < 0.2 * whole  # the bare base's
    engine.forget("org", None)
    assert engine.prefixes.held_bytes == 0


def test_the_prefix_cache_stays_within_its_bytes(base: Base) -> None:
    engine = Engine(base)
    engine.prefixes.most_bytes = 40 * BLOCK_TOKENS * base.cache_bytes_per_token
    for at in range(4):
        ask(engine, f"{at} {PERSONA}", None, max_tokens=1)
        drain(engine)
        assert engine.prefixes.held_bytes <= engine.prefixes.most_bytes
    assert engine.prefixes.held_bytes == engine.prefixes.most_bytes


def test_where_memory_runs_out_the_prefix_cache_is_given_up_before_a_sequence(base: Base) -> None:
    engine = Engine(base)
    told: list[TokenChunk] = []
    sequence = ask(engine, "Hello! " * 20, None, told)
    engine.step()
    assert engine.prefixes.held_bytes
    engine.shed(ErrorInfo(code="out_of_memory", message="m", cure="c"))
    assert not engine.prefixes.held_bytes
    drain(engine)
    assert len(sequence.output_ids) == 12
    engine.prefixes.clear()
    late = ask(engine, "Hello!", None, told)
    engine.scheduler.admit()
    engine.shed(ErrorInfo(code="out_of_memory", message="m", cure="c"))
    assert late.is_finished
    assert told[-1].error is not None


def test_short_prompts_of_different_voices_are_read_in_one_step(base: Base, computed: list[int]) -> None:
    engine = Engine(base)
    engine.scheduler.step_tokens = 512
    sequences = [ask(engine, "Hello!", adapter_of(base, at), org_id=f"o{at}") for at in range(4)]
    engine.step()
    assert computed == [sum(len(one.prompt_ids) for one in sequences)]
    assert [len(one.output_ids) for one in sequences] == [1] * 4


def test_the_recorded_system_prompt_is_used_where_none_is_sent(base: Base) -> None:
    engine = Engine(base)

    def prompt(*messages: Message) -> list[int]:
        request = GenerateRequest(
            request_id="r",
            org_id="o",
            adapter=None,
            messages=list(messages),
            temperature=0,
            top_p=1,
            top_k=0,
            max_tokens=4,
        )
        return engine.sequence(request, None, "You are a helpful pirate.", lambda chunk: None).prompt_ids

    user = Message(role="user", content="Hello!")
    recorded = Message(role="system", content="You are a helpful pirate.")
    assert prompt(user) == prompt(recorded, user)
    assert prompt(Message(role="system", content="Other."), user) != prompt(recorded, user)


def test_a_failed_step_is_told_to_every_sequence_in_flight(base: Base) -> None:
    engine = Engine(base)
    told: list[TokenChunk] = []
    ask(engine, "Hello!", None, told, max_tokens=50)
    engine.step()
    engine.fail_all(ErrorInfo(code="internal_error", message="m", cure="c"))
    assert told[-1].error is not None
    assert not engine.has_work


def test_what_can_never_fit_is_refused_with_the_numbers(base: Base) -> None:
    engine = Engine(base)
    with pytest.raises(InvalidInput, match="1024 positions"):
        ask(engine, "Hello!", None, max_tokens=5000)
    engine.cache_bytes = 1000
    with pytest.raises(InvalidInput, match="KV cache"):
        ask(engine, "Hello!", None)


def test_a_long_request_is_not_refused_because_many_are_in_flight(base: Base) -> None:
    """Beside eight rows it would not fit; alone it does, so it has to wait and not to fail."""
    engine = Engine(base)
    engine.cache_bytes = engine.cache.bytes_if([200] * 8, base.cache_bytes_per_token)
    for at in range(8):
        ask(engine, "Hello!", None, org_id=f"o{at}", max_tokens=30)
    for _ in range(10):
        engine.step()
    long = ask(engine, "Hello!", None, max_tokens=600)
    drain(engine)
    assert len(long.output_ids) == 600


def test_a_sequence_waits_while_the_cache_is_full(base: Base) -> None:
    engine = Engine(base)
    engine.cache_bytes = engine.cache.bytes_if([200] * 2, base.cache_bytes_per_token)
    sequences = [ask(engine, "Hello!", None, org_id=f"o{at}") for at in range(5)]
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, len(engine.scheduler.running))
    assert most == 2
    assert len({tuple(sequence.output_ids) for sequence in sequences}) == 1
