"""The conversations of a job as rows of tokens: what is trained on, what is held out, what became of the rest."""

from __future__ import annotations

from collections.abc import Generator

from repertory.contracts import Hyperparameters
from repertory.data.canaries import Canary, canaries
from repertory.data.conversations import Conversation, Message
from repertory.data.prepare import Split, split, with_system
from repertory.data.render import Renderer, Row
from repertory.errors import DataUnusable
from repertory.model import certificate
from repertory.model.certificate import Check

ROWS_PER_PORTION = 32  # rendered at a time: about 10 ms, which a live request hardly notices


class TrainingData:
    """The rendered conversations, and what became of those that are not among them."""

    def __init__(self, conversations: list[Conversation], parts: Split) -> None:
        self.conversations = conversations
        self.parts = parts
        self.training: list[Row] = []
        self.held_out: list[Row] = []
        self.rendered: list[tuple[list[Message], Row]] = []  # all of them, with what they were made of
        self.canaries: list[Canary] = []  # planted among `training`
        self.skipped: list[int] = []  # indices of conversations too long even for their last exchange
        self.shortened: dict[int, int] = {}  # index of a conversation to how many of its oldest messages it lost

    def add(self, renderer: Renderer, messages: list[Message], longest: int, rows: list[Row]) -> Row | None:
        """Render `messages` into `rows`. None: they are too long even for their last exchange."""
        row = renderer.row(messages, longest)
        if row is not None:
            rows.append(row)
            self.rendered.append((messages, row))
        return row

    @property
    def held_out_conversations(self) -> list[Conversation]:
        """Where to take test prompts from: the held-out conversations, or all where none is held out."""
        return [self.conversations[at] for at in self.parts.held_out or self.parts.training]

    @property
    def training_texts(self) -> list[str]:
        """What the assistant said in the conversations that were trained on."""
        chosen = (self.conversations[at] for at in self.parts.training)
        return [message.content for chat in chosen for message in chat.messages if message.is_trained]

    def checks(self, renderer: Renderer) -> list[Check]:
        return [
            certificate.only_the_assistant_is_trained(renderer, self.rendered).or_fail(),
            certificate.every_turn_end_is_trained(renderer, [row for _, row in self.rendered]).or_fail(),
        ]

    @property
    def warnings(self) -> list[str]:
        found = []
        if not self.held_out:
            found.append("Nothing was held out, so the report scores the training data and proves little.")
        if self.skipped:
            found.append(f"{len(self.skipped)} conversations were left out: too long for max_seq_length.")
        if self.shortened:
            found.append(f"{len(self.shortened)} conversations lost their oldest messages to fit max_seq_length.")
        return found


def training_data(
    renderer: Renderer,
    conversations: list[Conversation],
    validation_split: float,
    asked: Hyperparameters,
    longest: int,
    system_prompt: str | None,
) -> Generator[None, None, TrainingData]:
    """Split and render `conversations` to rows of at most `longest` tokens, in small portions.

    Raises DataUnusable where none of those to train on fits.
    """
    times = [conversation.timestamp for conversation in conversations]
    data = TrainingData(conversations, split(times, validation_split, asked.seed or 0))
    for indices, rows in ((data.parts.training, data.training), (data.parts.held_out, data.held_out)):
        for number, at in enumerate(indices):
            row = data.add(renderer, with_system(conversations[at], system_prompt), longest, rows)
            if row is None:
                data.skipped.append(at)
            elif row.dropped_messages:
                data.shortened[at] = row.dropped_messages
            if number % ROWS_PER_PORTION == 0:
                yield
    if not data.training:
        raise DataUnusable(
            f"none of the {len(data.parts.training)} conversations to train on fits into {longest} tokens",
            cure="Raise max_seq_length, or send shorter conversations.",
        )
    for canary in canaries(asked.canaries or 0, asked.seed or 0):
        if data.add(renderer, with_system(canary.conversation, system_prompt), longest, data.training) is not None:
            data.canaries.append(canary)
    return data
