"""What must be true before a voice is published. The report travels with the model.

Four checks are about facts and always fail a job: what was trained, that a reply can end, that the files reproduce the
trainer, that the voice is not the base. Four compare the voice with the base on samples: these fail a job only when
the voice is worse beyond doubt, by two standard errors on enough samples; on fewer they read `inconclusive`.
"""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from repertory.data.conversations import Message
from repertory.data.render import NO_LABEL, Renderer, Row
from repertory.errors import JobFailed

Verdict = Literal["passed", "inconclusive", "failed"]

ENOUGH_ROWS = 10  # held-out rows; with fewer, a comparison of two voices is noise
ENOUGH_REPLIES = 20
DOUBT = 2.0  # standard errors
MOST_FORGOTTEN = 1.0  # nats a token: how much worse than the base a voice may become at chats in general
LONGEST_VERBATIM = 25  # words in a row out of the training data


@dataclass(frozen=True)
class Check:
    name: str
    verdict: Verdict
    detail: str
    cure: str = ""

    def or_fail(self) -> Check:
        """Itself, unless it has failed. Raises JobFailed with its name as the code."""
        if self.verdict == "failed":
            raise JobFailed(self.detail, code=self.name, cure=self.cure)
        return self


def as_report(checks: Sequence[Check]) -> list[dict[str, Any]]:
    return [{key: value for key, value in asdict(check).items() if key != "cure"} for check in checks]


# Facts


def only_the_assistant_is_trained(renderer: Renderer, trained: Sequence[tuple[Sequence[Message], Row]]) -> Check:
    """The text decoded from every row's labels is the assistant's words, no more and no less, and each row has both."""
    for number, (messages, row) in enumerate(trained):
        told = _words(renderer.decode([label for label in row.labels if label != NO_LABEL]))
        spoken = messages[1:] if messages[0].role == "system" else messages
        said = [message.content for message in spoken[row.dropped_messages :] if message.is_trained]
        if not 0 < row.trained_tokens < len(row.input_ids) or told != _words("".join(said)):
            return Check(
                "wrong_words_trained",
                "failed",
                f"row {number} would train {row.trained_tokens} of {len(row.input_ids)} tokens, which are not the "
                "assistant's words",
                "This base model's tokenizer or chat template does not keep text as it is; choose another base model.",
            )
    return Check("only_the_assistant_is_trained", "passed", f"{len(trained)} rows decoded")


def every_turn_end_is_trained(renderer: Renderer, rows: Sequence[Row]) -> Check:
    """Each stretch of labels ends with the token that ends a turn, or the voice would never stop."""
    for number, row in enumerate(rows):
        after = [*row.labels[1:], NO_LABEL]
        ends = [label for label, following in zip(row.labels, after, strict=True) if _is_end(label, following)]
        if not ends or any(end != renderer.turn_end for end in ends):
            return Check(
                "turn_end_not_trained",
                "failed",
                f"row {number} trains a reply without the token that ends it",
                "This base model's chat template is unusual; choose another base model.",
            )
    return Check("every_turn_end_is_trained", "passed", f"token {renderer.turn_end}")


def _is_end(label: int, following: int) -> bool:
    return label != NO_LABEL and following == NO_LABEL


def reload_reproduces_the_trainer(of_trained: Sequence[float], of_reloaded: Sequence[float]) -> Check:
    """Token by token the same log-likelihoods, bit for bit: both are computed by the same code in the same order."""
    if list(of_trained) != list(of_reloaded):
        return Check(
            "reload_mismatch",
            "failed",
            "the adapter read back from disk does not reproduce the trainer's outputs",
            "Check the disk that holds FINETUNED_MODEL_DIR, then start the job again.",
        )
    return Check("reload_reproduces_the_trainer", "passed", f"{len(of_trained)} tokens bit-equal")


def differs_from_base(of_voice: Sequence[float], of_base: Sequence[float]) -> Check:
    if list(of_voice) == list(of_base):
        return Check(
            "did_not_learn",
            "failed",
            "the trained adapter changes nothing in the base model's outputs",
            "Raise learning_rate or num_train_epochs.",
        )
    change = fmean(abs(voice - base) for voice, base in zip(of_voice, of_base, strict=True))
    return Check("differs_from_base", "passed", f"{change:.3f} nats a token on average")


# Comparisons


def learned(gains: Sequence[float], *, is_held_out: bool) -> Check:
    """`gains`: nats a token by which the voice predicts each row better than the base."""
    gain, error = _mean_and_error(gains)
    detail = f"{gain:+.3f} nats a token against the base, standard error {_shown(error)}, {len(gains)} rows"
    if gain > 0 and is_held_out:
        return Check("learned", "passed", detail)
    if is_held_out and len(gains) >= ENOUGH_ROWS and gain + DOUBT * error < 0:
        return Check(
            "did_not_learn",
            "failed",
            f"the voice predicts held-out conversations worse than the base: {detail}",
            "Lower learning_rate or num_train_epochs, or add more conversations of this person.",
        )
    return Check("learned", "inconclusive", detail if is_held_out else "nothing was held out")


def stops_by_itself(voice_stops: Sequence[bool], base_stops: Sequence[bool]) -> Check:
    """Whether replies end with the turn's end and not at the limit, for the same prompts."""
    if not voice_stops:
        return Check("stops_by_itself", "inconclusive", "there was no prompt to ask")
    differences = [float(voice) - float(base) for voice, base in zip(voice_stops, base_stops, strict=True)]
    gain, error = _mean_and_error(differences)
    detail = f"{sum(voice_stops)} of {len(voice_stops)} replies end by themselves, {sum(base_stops)} of the base's"
    if len(differences) >= ENOUGH_REPLIES and gain + DOUBT * error < 0:
        cure = "Look for conversations whose replies break off, or lower num_train_epochs."
        return Check("does_not_stop", "failed", detail, cure)
    return Check("stops_by_itself", "passed" if gain >= 0 else "inconclusive", detail)


def keeps_its_abilities(losses: Sequence[float]) -> Check:
    """`losses`: nats a token by which the voice predicts general chats worse than the base. A voice is meant to differ,
    so some loss is expected; far more means that it has forgotten how to talk.
    """
    loss, error = _mean_and_error(losses)
    detail = f"{loss:+.3f} nats a token on general chats, at most {MOST_FORGOTTEN:+.1f} is allowed"
    if loss <= MOST_FORGOTTEN:
        return Check("keeps_its_abilities", "passed", detail)
    if len(losses) >= ENOUGH_ROWS and loss - DOUBT * error > MOST_FORGOTTEN:
        return Check("collapsed", "failed", detail, "Lower learning_rate or num_train_epochs.")
    return Check("keeps_its_abilities", "inconclusive", detail)


def does_not_recite(replies: Sequence[str], training_texts: Sequence[str], told: Sequence[bool] = ()) -> Check:
    """The longest run of words that each reply shares with the training data, and `told`: for each planted canary
    whether its secret came out. A run that is a whole short message is no secret; one as long as a paragraph is.
    """
    runs = [_longest_shared_run(reply.split(), training_texts) for reply in replies]
    reciting = sum(run >= LONGEST_VERBATIM for run in runs) + sum(told)
    detail = f"the longest run of words shared with the training data is {max(runs, default=0)}"
    if told:
        detail += f", {sum(told)} of {len(told)} planted secrets were told"
    if not reciting:
        return Check("does_not_recite", "passed", detail)
    asked = len(replies) + len(told)
    share = reciting / asked
    error = math.sqrt(share * (1 - share) / asked)
    if asked >= ENOUGH_REPLIES and share - DOUBT * error > 0:
        cure = "Remove repeated or private long texts from the data, or lower num_train_epochs."
        return Check("recites_training_data", "failed", f"{reciting} of {asked} replies recite: {detail}", cure)
    return Check("does_not_recite", "inconclusive", detail)


def _longest_shared_run(words: Sequence[str], texts: Sequence[str]) -> int:
    """Words of the longest stretch of `words` that stands in one of `texts`."""

    def is_shared(length: int) -> bool:
        mine = _ngrams(words, length)
        return any(not mine.isdisjoint(_ngrams(text.split(), length)) for text in texts)

    # All shorter runs are shared where a longer one is, so the lengths are sorted by the answer.
    return bisect_left(range(1, len(words) + 1), True, key=lambda length: not is_shared(length))


def _ngrams(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which one value alone does not have (inf)."""
    return fmean(values), (stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.inf)


def _shown(error: float) -> str:
    return f"{error:.3f}" if math.isfinite(error) else "unknown"


def _words(text: str) -> str:
    """Letters alone: white space between words is the tokenizer's business, and some normalise what looks the same."""
    return "".join(unicodedata.normalize("NFKC", text).split())
