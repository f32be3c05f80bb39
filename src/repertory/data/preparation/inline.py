"""Conversations that come with a request: looked through as those of an export are, and changed only if asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from repertory.data.conversations import Conversation
from repertory.data.findings import Findings
from repertory.data.preparation.duplicates import Duplicates, pairs
from repertory.data.preparation.pipeline import WARN_BELOW
from repertory.data.preparation.privacy import Surrogates
from repertory.data.preparation.scratch import Scratch


@dataclass(frozen=True)
class Inspection:
    """What was found in conversations, and what preparing makes of them: no personal data, nothing learned twice."""

    findings: Findings
    prepared: list[Conversation]
    surrogates: Counter[str]  # replacements by kind
    duplicates: Counter[str]  # turns that are not learned again, by reason


def inspect(conversations: Sequence[Conversation]) -> Inspection:
    """Findings name their places as paths into the request."""
    findings = Findings()
    turns = sum(len(list(pairs(conversation))) for conversation in conversations)
    if turns < WARN_BELOW:
        findings.add("little_data", "conversations", None, f"There are {turns:,} turns to learn from.")
    if not any(message.role == "user" for conversation in conversations for message in conversation.messages):
        findings.add("one_sided", "conversations", None, "There is no message of a user.")
    surrogates = Surrogates()
    prepared: list[Conversation] = []
    with Scratch() as scratch:
        duplicates = Duplicates(scratch, turns)
        for number, conversation in enumerate(conversations):
            path = f"conversations[{number}]"
            clean = _without_personal_data(conversation, path, surrogates, findings)
            repeated = duplicates.repeated(clean)
            for turn, reason in repeated.items():
                findings.add(reason, path, None, f"Learned turn {turn + 1} of it repeats an earlier one.")
            left = duplicates.unlearned(clean, repeated)
            if left is not None:
                prepared.append(left)
    return Inspection(findings, prepared, surrogates.counts, duplicates.reasons)


def _without_personal_data(
    conversation: Conversation, path: str, surrogates: Surrogates, findings: Findings
) -> Conversation:
    messages = []
    for number, message in enumerate(conversation.messages):
        before = surrogates.counts.copy()
        text = surrogates.replace(message.content)
        for kind in surrogates.counts - before:
            findings.add(
                "personal_data", f"{path}.messages[{number}].content", None, f"It holds personal data: {kind}."
            )
        messages.append(message if text == message.content else message.model_copy(update={"content": text}))
    return conversation.model_copy(update={"messages": messages})
