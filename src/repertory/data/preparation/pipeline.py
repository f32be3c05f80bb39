"""The stages of preparation in their order, and the report about them.

people → noise → sessions → bursts → personal data → conversations → duplicates → split
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from repertory.data.conversations import Conversation, Message
from repertory.data.findings import Findings
from repertory.data.history import Author, Entry, History, ImportReport
from repertory.data.preparation.context import Voices, pieces
from repertory.data.preparation.duplicates import Duplicates, leakage
from repertory.data.preparation.identity import Identity, find_all, identify, labels, masking
from repertory.data.preparation.noise import MAX_CHARACTERS, has_words, noise, without_quotes
from repertory.data.preparation.privacy import Surrogates
from repertory.data.preparation.scratch import Conversations, Scratch
from repertory.data.preparation.sessions import gap_for, sessions, turns
from repertory.data.preparation.style import StyleCard, style_card
from repertory.data.prepare import Split, split
from repertory.errors import InvalidInput

ASSISTANT = "assistant"  # the persona of histories between a user and an assistant, where none is named
NO_GAP = 1 << 40  # seconds; pauses part nothing
WARN_BELOW = 1000  # trained turns
SPEAKS_LITTLE = 0.05
ONE_SIDED = 0.95
HELD_OUT_SHARE = 0.1
MAX_STYLED = 5000  # messages that the style is measured on; of more, as many are, evenly spread


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How a history becomes conversations. Authors are named by id or by any name they had."""

    persona: Sequence[str] = ()  # several accounts of one person are one persona
    gap_seconds: int | None = None  # None: found from the pauses of this history
    exclude: Sequence[str] = ()  # people whose words must not be used
    mask: Sequence[str] = ()  # people whose names must not be
    mask_others: bool = False  # everybody but the persona
    live_since: float | None = (
        None  # seconds since 1970: when a clone of the persona went live; later words are left out
    )
    keep_bots: bool = False  # bots other than the persona, as people who speak
    platform: str | None = None  # recorded with the conversations


@dataclass(frozen=True)
class Stage:
    """What a stage was given and what it passed on, counted in `unit`."""

    name: str
    unit: str
    before: int
    after: int
    dropped: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """What of the held-out turns is also trained on, at the default share held out."""

    held_out_turns: int
    same_exchange: int  # the same reply to the same words
    same_long_reply: int  # of 40 characters or more


@dataclass(kw_only=True)
class PreparationReport:
    format: str
    persona: str
    gap_seconds: int | None
    gap_found_by: str
    stages: list[Stage]
    conversations: int
    trained_turns: int
    characters: int
    persona_share: float  # of the messages with words, bots aside
    surrogates: dict[str, int]
    leakage: Leakage
    style: StyleCard
    findings: Findings


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Conversations ready to be trained on, in order of time where there are times."""

    conversations: Conversations  # with the ids of those whose words are in each
    system_prompt: str | None  # what the voice is told at training and at serving alike
    split: Split
    report: PreparationReport


@dataclass(frozen=True)
class _People:
    """Who is who in the history."""

    identity: Identity
    excluded: frozenset[str]
    masked: frozenset[str]  # the excluded among them
    called: dict[str, str]
    is_dialogue: bool  # between a user and an assistant

    @property
    def persona(self) -> str:
        """The id under which its accounts are one author."""
        return min(self.identity.persona)


@dataclass(frozen=True)
class _Sessions:
    gap: int
    gap_found_by: str
    persona_turns: int
    have_times: bool
    in_groups: bool


def prepare(history: History, options: PrepareOptions, scratch: Scratch) -> Prepared:
    """Read the history to its end and make conversations of it, which last as long as `scratch`.

    Raises InvalidInput where the persona is unknown or ambiguous, or nothing to learn from is left.
    """
    said = scratch.keep(history)
    read = history.report
    check_read(read)
    stages = [_reading(read, said)]
    people = _people(read, options)
    _sift(scratch, people, options, stages)
    if scratch.count_of(people.persona) == 0:
        raise _nothing(stages, people.identity)
    masked = _names(read.authors, people)
    style = _style(scratch, people, masked)
    found = _find_sessions(scratch, people, options, stages)
    surrogates = _make_conversations(scratch, people, found, masked, options, stages)
    _drop_duplicates(scratch, stages)
    made = scratch.conversations
    if not made:
        raise _nothing(stages, people.identity)

    times = [conversation.timestamp for conversation in made]
    parts = split(times, HELD_OUT_SHARE, seed=0)
    report = PreparationReport(
        format=read.format,
        persona=people.identity.name,
        gap_seconds=None if found.gap == NO_GAP else found.gap,
        gap_found_by=found.gap_found_by,
        stages=stages,
        conversations=len(made),
        trained_turns=stages[-1].after,
        characters=sum(len(message.content) for conversation in made for message in conversation.messages),
        persona_share=_share(read, people.identity),
        surrogates=dict(surrogates.counts),
        leakage=_leakage(made, parts),
        style=style_card(style, scratch.count_of(people.persona), found.persona_turns),
        findings=read.findings,
    )
    _warn(report, people.identity, has_times=None not in times)
    prompt = None if people.is_dialogue else system_prompt(people.identity.name, found.in_groups)
    return Prepared(conversations=made, system_prompt=prompt, split=parts, report=report)


def check_read(read: ImportReport) -> None:
    """Raises InvalidInput where there is nobody to choose from."""
    if read.authors:
        return
    wrong = [finding for finding in read.findings.kept if finding.severity != "note"][:3]
    why = "; ".join(f"{finding.path}: {finding.what.rstrip('.')}" for finding in wrong)
    raise InvalidInput(
        f"no words of anybody are in this {read.format} history{f': {why}' if why else ''}",
        code="nothing_read",
        cure="Check that it is the whole export and the right format, or export it again.",
    )


def system_prompt(name: str, in_groups: bool) -> str:
    """What the voice is told, at training and at serving alike."""
    about = f"You are {name}, chatting."
    return f"{about} Where several people speak, each line says who." if in_groups else about


def _reading(read: ImportReport, kept: int) -> Stage:
    other = {kind: count for kind, count in read.other.items() if kind != "media"}
    return Stage("reading", "messages", read.entries, kept, other)


def _people(read: ImportReport, options: PrepareOptions) -> _People:
    is_dialogue = set(read.authors) <= {"user", ASSISTANT}
    identity = identify(read.authors, options.persona or ([ASSISTANT] if is_dialogue else []))
    excluded, not_excluded = find_all(read.authors, options.exclude)
    if excluded & identity.persona:
        raise InvalidInput(
            "the persona is on the list of people whose words must not be used",
            code="persona_excluded",
            cure="Take it from the list, or choose another persona.",
        )
    masked, not_masked = find_all(read.authors, options.mask)
    for name in [*not_excluded, *not_masked]:
        read.findings.add("listed_unknown", "", None, f"Nobody who speaks in this history is {name[:60]!r}.")
    masked |= excluded
    if options.mask_others:
        masked = frozenset(read.authors)
    masked -= identity.persona
    return _People(identity, excluded, masked, labels(read.authors, masked), is_dialogue)


def _sift(scratch: Scratch, people: _People, options: PrepareOptions, stages: list[Stage]) -> None:
    """Two stages: people whose words are not used, and what teaches no voice."""
    before = stages[-1].after
    dropped = scratch.sift(lambda entry: _unwelcome(entry, people, options))
    stages.append(Stage("people", "messages", before, before - dropped.total(), dict(dropped)))

    def why(entry: Entry) -> str | None:
        if people.is_dialogue:
            return None if has_words(entry.text) else "no_words"
        entry.text = without_quotes(entry.text)
        return noise(entry, is_persona=entry.author_id in people.identity.persona)

    before = stages[-1].after
    dropped = scratch.sift(why)
    stages.append(Stage("noise", "messages", before, before - dropped.total(), dict(dropped)))
    scratch.one_author(people.identity.persona)


def _unwelcome(entry: Entry, people: _People, options: PrepareOptions) -> str | None:
    if entry.author_id in people.excluded:
        return "author_excluded"
    if entry.is_bot and not options.keep_bots and entry.author_id not in people.identity.persona:
        return "bot"
    if options.live_since is not None and entry.time is not None and entry.time >= options.live_since:
        return "after_clone_went_live"
    return None


def _find_sessions(scratch: Scratch, people: _People, options: PrepareOptions, stages: list[Stage]) -> _Sessions:
    """Two stages: bursts as turns, and turns as sessions, of which those stay in which the persona speaks."""
    streams = list(scratch.streams())
    has_times = all(stream.has_times for stream in streams if stream.thread is None)
    gap, gap_found_by = _gap(scratch, options, has_times=has_times, is_dialogue=people.is_dialogue)
    all_turns = all_sessions = with_persona = persona_turns = 0
    have_times, in_groups = True, False
    for stream in streams:
        parent = scratch.parent(stream)
        hangs_from = None if parent is None else next(turns([parent], gap))
        for session in sessions(stream.channel, turns(scratch.entries(stream), gap), gap, hangs_from):
            own = session.turns[session.context :]
            of_persona = sum(turn.author_id == people.persona for turn in own)
            all_turns += len(own)
            all_sessions += 1
            persona_turns += of_persona
            if of_persona:
                with_persona += 1
                have_times = have_times and bool(own[0].begin)
                in_groups = in_groups or len(session.speakers) > 2
                scratch.add_session(session)
    stages.append(Stage("bursts", "messages to turns", stages[-1].after, all_turns, {}))
    dropped = {"without_persona": all_sessions - with_persona}
    stages.append(Stage("sessions", "sessions", all_sessions, with_persona, dropped))
    return _Sessions(gap, gap_found_by, persona_turns, have_times, in_groups)


def _gap(scratch: Scratch, options: PrepareOptions, *, has_times: bool, is_dialogue: bool) -> tuple[int, str]:
    if is_dialogue:
        return NO_GAP, "conversations as they are"
    if options.gap_seconds is not None:
        return options.gap_seconds, "given"
    if not has_times:
        return NO_GAP, "no times"
    return gap_for(scratch.pauses(), in_groups=scratch.has_group())


def _style(scratch: Scratch, people: _People, masked: Callable[[str], str]) -> list[str]:
    """Texts of the persona to tell its style from, and no more of anybody than the conversations will have."""
    surrogates = Surrogates()
    sample = scratch.texts_of(people.persona, MAX_STYLED, MAX_CHARACTERS)
    return [surrogates.replace(masked(text)) for text in sample]


def _make_conversations(
    scratch: Scratch,
    people: _People,
    found: _Sessions,
    masked: Callable[[str], str],
    options: PrepareOptions,
    stages: list[Stage],
) -> Surrogates:
    """Personal data replaced, and each session as conversations. Returns what was replaced."""
    voices = Voices({people.persona}, people.called, options.platform)
    surrogates = Surrogates()
    trained = 0
    # By time, so that surrogates are numbered alike whatever program wrote the export.
    for session in scratch.sessions(by_time=found.have_times):
        for turn in session.turns:
            turn.texts = [surrogates.replace(masked(text)) for text in turn.texts]
        prompt = surrogates.replace(masked(scratch.prompt(session.channel) or ""))
        for piece in pieces(session, voices, uncut=people.is_dialogue):
            conversation = _with_prompt(piece.conversation, prompt)
            accounts = people.identity.persona if people.persona in piece.authors else frozenset[str]()
            scratch.add_conversation(conversation, piece.authors | accounts)
            trained += _trained_turns(conversation)
    dropped = {"nobody_prompted": found.persona_turns - trained}
    stages.append(Stage("conversations", "turns of the persona", found.persona_turns, trained, dropped))
    return surrogates


def _drop_duplicates(scratch: Scratch, stages: list[Stage]) -> None:
    trained = stages[-1].after
    duplicates = Duplicates(scratch, trained)
    scratch.revise(duplicates.revised)
    after = trained - duplicates.reasons.total()
    stages.append(Stage("duplicates", "turns of the persona", trained, after, dict(duplicates.reasons)))


def _names(authors: Mapping[str, Author], people: _People) -> Callable[[str], str]:
    """Puts labels for the names of masked people in what others say."""
    return masking({name: people.called[one] for one in sorted(people.masked) for name in authors[one].names})


def _with_prompt(conversation: Conversation, prompt: str) -> Conversation:
    """The conversation after the system prompt of its channel, where the history brings one."""
    if not has_words(prompt):
        return conversation
    messages = [Message(role="system", content=prompt), *conversation.messages]
    return conversation.model_copy(update={"messages": messages})


def _trained_turns(conversation: Conversation) -> int:
    return sum(message.is_trained for message in conversation.messages)


def _share(read: ImportReport, identity: Identity) -> float:
    """Of the messages, bots aside."""
    people = [author for author in read.authors.values() if author.id in identity.persona or not author.is_bot]
    mine = sum(author.messages for author in people if author.id in identity.persona)
    return round(mine / sum(author.messages for author in people), 3)


def _leakage(made: Conversations, parts: Split) -> Leakage:
    is_held_out = set(parts.held_out)
    held_out = [conversation for at, conversation in enumerate(made) if at in is_held_out]
    training = (conversation for at, conversation in enumerate(made) if at not in is_held_out)
    exchanges, replies, turns = leakage(training, held_out)
    return Leakage(held_out_turns=turns, same_exchange=exchanges, same_long_reply=replies)


def _warn(report: PreparationReport, identity: Identity, *, has_times: bool) -> None:
    findings = report.findings
    if report.trained_turns < WARN_BELOW:
        findings.add("little_data", "", None, f"There are {report.trained_turns:,} turns to learn from.")
    if report.persona_share > ONE_SIDED:
        findings.add("one_sided", "", None, f"The persona wrote {report.persona_share:.1%} of the messages.")
    elif report.persona_share < SPEAKS_LITTLE:
        findings.add(
            "persona_speaks_little", "", None, f"The persona wrote {report.persona_share:.1%} of the messages."
        )
    for author in identity.suggestions:
        what = f"{author.name!r} ({author.messages:,} messages) may be the persona too."
        findings.add("persona_alike", "", None, what)
    if not has_times:
        findings.add("times_unknown", "")


def _nothing(stages: Sequence[Stage], identity: Identity) -> InvalidInput:
    reasons = ", ".join(f"{why} {count:,}" for stage in stages for why, count in stage.dropped.items() if count)
    return InvalidInput(
        f"nothing of {identity.name} is left to learn from; left out: {reasons or 'nothing'}",
        code="nothing_to_learn",
        cure="Check the persona and the format, and that others speak in the history too.",
    )
