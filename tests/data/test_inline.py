"""Conversations of a request: what is found in them, and what preparing makes of them."""

from __future__ import annotations

from histories import conversation, shown
from repertory.data.findings import MAX_FINDINGS
from repertory.data.preparation.inline import inspect

LONG = "I have been thinking about the garden all day and I really believe we should plant more tomatoes this year"


def test_what_is_found_has_its_place_and_nothing_is_dropped_unseen() -> None:
    sent = [
        conversation("your mail?", "ana@x.yz", system="be kind"),
        conversation("Your mail?", "ana@x.yz", "and?", "call +49 170 1234567"),
        conversation("garden?", LONG, system="be kind"),
        conversation("plans?", LONG + "!", system="be rude"),
    ]
    found = inspect(sent)
    assert [(f.path, f.code, f.severity) for f in found.findings.kept] == [
        ("conversations", "little_data", "warning"),
        ("conversations[0].messages[2].content", "personal_data", "warning"),
        ("conversations[1].messages[1].content", "personal_data", "warning"),
        ("conversations[1].messages[3].content", "personal_data", "warning"),
        ("conversations[1]", "exact_duplicate", "warning"),
        ("conversations[3]", "near_duplicate", "warning"),  # whatever the system prompts
    ]
    assert "x.yz" not in str(found.findings)
    assert all(finding.what and finding.cure for finding in found.findings.kept)
    assert [shown(one) for one in found.prepared] == [
        ["#be kind", "your mail?", "*<EMAIL_1>"],
        ["Your mail?", "-<EMAIL_1>", "and?", "*call <PHONE_1>"],
        ["#be kind", "garden?", f"*{LONG}"],
    ]
    assert (found.surrogates, found.duplicates) == (
        {"EMAIL": 2, "PHONE": 1},
        {"exact_duplicate": 1, "near_duplicate": 1},
    )
    assert shown(sent[0])[-1] == "*ana@x.yz"


def test_nobody_asks() -> None:
    alone = conversation("a", "b").model_copy(update={"messages": conversation("a", "b").messages[1:]})
    assert inspect([alone]).findings.counts == {"little_data": 1, "one_sided": 1}


def test_a_thousand_are_kept_and_all_are_counted() -> None:
    found = inspect([conversation("hi", "hello")] * 1500).findings
    assert len(found.kept) == MAX_FINDINGS
    assert found.counts == {"exact_duplicate": 1499}
