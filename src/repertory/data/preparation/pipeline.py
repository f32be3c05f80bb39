"""The stages of preparation in their order, and the report about them.

people → noise → sessions → bursts → personal data → conversations → duplicates → split
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from repertory.data.conversations import Conversation, Message
from repertory.data.findings import Findings
from repertory.data.history import Author, Entry, History, ImportReport
from repertory.data.preparation.context import Piece, Voices, pieces
from repertory.data.preparation.duplicates import leakage, without_duplicates
from repertory.data.preparation.identity import Identity, find_all, hashed, identify, labels
from repertory.data.preparation.noise import has_words, noise, without_quotes
from repertory.data.preparation.privacy import Surrogates
from repertory.data.preparation.sessions import Session, gap_for, sessions, streams, turns
from repertory.data.preparation.style import StyleCard, style_card
from repertory.data.prepare import Split, split
from repertory.errors import InvalidInput

ASSISTANT = "assistant"  # the persona of histories between a user and an assistant, where none is named
NO_GAP = 1 << 40  # seconds; pauses part nothing
WARN_BELOW = 1000  # trained turns
SPEAKS_LITTLE = 0.05
HELD_OUT_SHARE = 0.1
MIN_NAME_CHARACTERS = 3  # shorter names are words, and stay in what others say


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
    org_id: str = ""  # keys the hashes of authors


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

    conversations: list[Conversation]
    authors: list[frozenset[str]]  # per conversation, the hashes of those whose words are in it
    system_prompt: str | None  # what the voice is told at training and at serving alike
    split: Split
    report: PreparationReport


def prepare(history: History, options: PrepareOptions) -> Prepared:
    """Read the history to its end and make conversations of it.

    Raises InvalidInput where the persona is unknown or ambiguous, or nothing to learn from is left.
    """
    entries = _kept(history)
    read = history.report
    is_dialogue = set(read.authors) <= {"user", ASSISTANT} and bool(read.authors)
    prompts = {entry.channel: entry.text for entry in entries if entry.kind == "prompt"}
    said = [entry for entry in entries if entry.kind == "said"]
    del entries
    stages = [_reading(read, len(said))]

    identity = identify(read.authors, options.persona or ([ASSISTANT] if is_dialogue else []))
    excluded = find_all(read.authors, options.exclude)
    if excluded & identity.persona:
        raise InvalidInput(
            "the persona is on the list of people whose words must not be used",
            code="persona_excluded",
            cure="Take it from the list, or choose another persona.",
        )
    said = _stage(stages, "people", said, lambda entry: _unwelcome(entry, identity, excluded, options))
    if is_dialogue:
        said = _stage(stages, "noise", said, lambda entry: None if has_words(entry.text) else "no_words")
    else:
        for entry in said:
            entry.text = without_quotes(entry.text)
        said = _stage(stages, "noise", said, lambda e: noise(e, is_persona=e.author_id in identity.persona))
    persona_messages = [entry.text for entry in said if entry.author_id in identity.persona]
    if not persona_messages:
        raise _nothing(stages, identity)

    found = streams(said)
    gap, gap_found_by = _gap(found, options, is_dialogue)
    all_turns, all_sessions = _sessions(found, gap, identity)
    stages.append(Stage("bursts", "messages to turns", len(said), all_turns, {}))
    with_persona = [s for s in all_sessions if any(t.author_id in identity.persona for t in s.turns[s.context :])]
    dropped = {"without_persona": len(all_sessions) - len(with_persona)}
    stages.append(Stage("sessions", "sessions", len(all_sessions), len(with_persona), dropped))

    # An order that the export does not decide: so surrogates are numbered alike whatever program wrote it.
    if all(session.turns[session.context].begin for session in with_persona):
        with_persona.sort(key=lambda session: (session.turns[session.context].begin, [t.text for t in session.turns]))
    masked = excluded | find_all(read.authors, options.mask)
    if options.mask_others:
        masked = frozenset(read.authors) - identity.persona
    called = labels(read.authors, masked - identity.persona)
    surrogates = Surrogates()
    _clean(with_persona, surrogates, _names(read.authors, masked - identity.persona, called))

    voices = Voices(identity.persona, called, options.platform)
    made = [(piece, session) for session in with_persona for piece in pieces(session, voices, uncut=is_dialogue)]
    persona_turns = sum(t.author_id in identity.persona for s in with_persona for t in s.turns[s.context :])
    made = [(_with_prompt(piece, session, prompts), session) for piece, session in made]
    trained = sum(_trained_turns(piece.conversation) for piece, _ in made)
    stages.append(
        Stage(
            "conversations",
            "turns of the persona",
            persona_turns,
            trained,
            {"nobody_prompted": persona_turns - trained},
        )
    )

    kept, repeated = without_duplicates([piece.conversation for piece, _ in made])
    conversations = [conversation for conversation in kept if conversation is not None]
    authors = [
        frozenset(hashed(author, options.org_id) for author in piece.authors)
        for (piece, _), conversation in zip(made, kept, strict=True)
        if conversation is not None
    ]
    trained_after = sum(_trained_turns(conversation) for conversation in conversations)
    stages.append(Stage("duplicates", "turns of the persona", trained, trained_after, dict(repeated)))
    if not conversations:
        raise _nothing(stages, identity)

    parts = split(conversations, HELD_OUT_SHARE, seed=0)
    exchanges, replies, held_out_turns = leakage(
        (conversations[at] for at in parts.training), (conversations[at] for at in parts.held_out)
    )
    people = [author for author in read.authors.values() if author.id in identity.persona or not author.is_bot]
    mine = sum(author.messages for author in people if author.id in identity.persona)
    report = PreparationReport(
        format=read.format,
        persona=identity.name,
        gap_seconds=None if gap == NO_GAP else gap,
        gap_found_by=gap_found_by,
        stages=stages,
        conversations=len(conversations),
        trained_turns=trained_after,
        characters=sum(len(message.content) for conversation in conversations for message in conversation.messages),
        persona_share=round(mine / sum(author.messages for author in people), 3),
        surrogates=dict(surrogates.counts),
        leakage=Leakage(held_out_turns=held_out_turns, same_exchange=exchanges, same_long_reply=replies),
        style=style_card(persona_messages, persona_turns),
        findings=read.findings,
    )
    _warn(report, identity, conversations)
    prompt = None if is_dialogue else system_prompt(identity.name, any(len(s.speakers) > 2 for s in with_persona))
    return Prepared(conversations=conversations, authors=authors, system_prompt=prompt, split=parts, report=report)


def system_prompt(name: str, in_groups: bool) -> str:
    """What the voice is told, at training and at serving alike."""
    about = f"You are {name}, chatting."
    return f"{about} Where several people speak, each line says who." if in_groups else about


def _kept(history: History) -> list[Entry]:
    """The words and system prompts, with one string for each name: every record of an export brings its own."""
    names: dict[str, str] = {}
    kept = []
    for entry in history:
        if entry.kind in ("said", "prompt"):
            entry.author_id = names.setdefault(entry.author_id, entry.author_id)
            entry.author = names.setdefault(entry.author, entry.author)
            entry.channel = names.setdefault(entry.channel, entry.channel)
            kept.append(entry)
    return kept


def _reading(read: ImportReport, kept: int) -> Stage:
    other = {kind: count for kind, count in read.other.items() if kind != "media"}
    return Stage("reading", "messages", read.entries, kept, other)


def _stage(stages: list[Stage], name: str, entries: list[Entry], why: Callable[[Entry], str | None]) -> list[Entry]:
    """The entries that nothing speaks against, and one more stage."""
    kept = []
    dropped: Counter[str] = Counter()
    for entry in entries:
        if (reason := why(entry)) is None:
            kept.append(entry)
        else:
            dropped[reason] += 1
    stages.append(Stage(name, "messages", len(entries), len(kept), dict(dropped)))
    return kept


def _unwelcome(entry: Entry, identity: Identity, excluded: frozenset[str], options: PrepareOptions) -> str | None:
    if entry.author_id in excluded:
        return "author_excluded"
    if entry.is_bot and not options.keep_bots and entry.author_id not in identity.persona:
        return "bot"
    if options.live_since is not None and entry.time is not None and entry.time >= options.live_since:
        return "after_clone_went_live"
    return None


def _gap(found: list[tuple[list[Entry], Entry | None]], options: PrepareOptions, is_dialogue: bool) -> tuple[int, str]:
    main = [said for said, parent in found if parent is None]
    if is_dialogue:
        return NO_GAP, "conversations as they are"
    if options.gap_seconds is not None:
        return options.gap_seconds, "given"
    if any(entry.time is None for said in main for entry in said):
        return NO_GAP, "no times"
    return gap_for(main)


def _sessions(found: list[tuple[list[Entry], Entry | None]], gap: int, identity: Identity) -> tuple[int, list[Session]]:
    """(turns, sessions). Two accounts of the persona are one author."""
    first = min(identity.persona)
    for said, _ in found:
        for entry in said:
            if entry.author_id in identity.persona:
                entry.author_id = first
    count = 0
    all_sessions: list[Session] = []
    for said, parent in found:
        of_stream = turns(said, gap)
        count += len(of_stream)
        hangs_from = turns([parent], gap)[0] if parent is not None else None
        all_sessions += sessions(said[0].channel, of_stream, gap, hangs_from)
    return count, all_sessions


def _names(authors: dict[str, Author], masked: frozenset[str], called: dict[str, str]) -> Callable[[str], str]:
    """A function that puts labels for the names of masked people in what others say."""
    names = {
        name.casefold(): called[one]
        for one in sorted(masked)
        for name in authors[one].names
        if len(name) >= MIN_NAME_CHARACTERS
    }
    if not names:
        return str
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)
    return lambda text: pattern.sub(lambda found: names.get(found[0].casefold(), "Somebody"), text)


def _clean(all_sessions: Iterable[Session], surrogates: Surrogates, masked: Callable[[str], str]) -> None:
    for session in all_sessions:
        for turn in session.turns:
            turn.texts = [surrogates.replace(masked(text)) for text in turn.texts]


def _with_prompt(piece: Piece, session: Session, prompts: dict[str, str]) -> Piece:
    """The piece after the system prompt of its channel, where the history brings one."""
    prompt = prompts.get(session.channel)
    if not prompt or not has_words(prompt):
        return piece
    messages = [Message(role="system", content=prompt), *piece.conversation.messages]
    return Piece(piece.conversation.model_copy(update={"messages": messages}), piece.authors)


def _trained_turns(conversation: Conversation) -> int:
    return sum(message.is_trained for message in conversation.messages)


def _warn(report: PreparationReport, identity: Identity, conversations: Sequence[Conversation]) -> None:
    findings = report.findings
    if report.trained_turns < WARN_BELOW:
        findings.add("little_data", "", None, f"There are {report.trained_turns:,} turns to learn from.")
    if report.persona_share == 1:
        findings.add("one_sided", "")
    elif report.persona_share < SPEAKS_LITTLE:
        findings.add(
            "persona_speaks_little", "", None, f"The persona wrote {report.persona_share:.1%} of the messages."
        )
    for author in identity.suggestions:
        what = f"{author.name!r} ({author.messages:,} messages) may be the persona too."
        findings.add("persona_alike", "", None, what)
    if any(conversation.timestamp is None for conversation in conversations):
        findings.add("times_unknown", "")


def _nothing(stages: Sequence[Stage], identity: Identity) -> InvalidInput:
    reasons = ", ".join(f"{why} {count:,}" for stage in stages for why, count in stage.dropped.items() if count)
    return InvalidInput(
        f"nothing of {identity.name} is left to learn from; left out: {reasons or 'nothing'}",
        code="nothing_to_learn",
        cure="Check the persona and the format, and that others speak in the history too.",
    )
