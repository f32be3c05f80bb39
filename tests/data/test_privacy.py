"""Personal data as typed surrogates."""

from __future__ import annotations

import pytest

from histories import dialogue, run, say, shown
from repertory.data.history import Entry
from repertory.data.preparation.privacy import Surrogates, is_card, is_iban


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("mail me: Ana.B+x@mail.example.com!", "mail me: <EMAIL_1>!"),
        ("call +49 170 1234567 or (030) 123 4567", "call <PHONE_1> or <PHONE_2>"),
        ("card 4111 1111 1111 1111.", "card <CARD_1>."),
        ("number 4111 1111 1111 1112.", "number 4111 1111 1111 1112."),
        ("06 12 34 56 78, 415-555-2671 or 1 415.555.2671", "<PHONE_1>, <PHONE_2> or <PHONE_3>"),
        ("on 01.02.2024 at 2024-01-02 10 20 30", "on 01.02.2024 at 2024-01-02 10 20 30"),
        ("@491701234567 come! @user12345678 @123", "@<PHONE_1> come! @user12345678 @123"),
        ("@\u2068491701234567\u2069 is +49 170 1234567", "@<PHONE_1> is <PHONE_1>"),
        ("jürgen@bücher.example or ana@пример.рф", "<EMAIL_1> or <EMAIL_2>"),
        ("IBAN DE89 3704 0044 0532 0130 00 ok", "IBAN <IBAN_1> ok"),
        ("DE88 3704 0044 0532 0130 00", "DE88 3704 0044 0532 0130 00"),
        ("be68 5390 0754 7034 this is it", "<IBAN_1> this is it"),
        ("GB82WEST12345698765432 OK GB82-WEST-1234-5698-7654-32", "<IBAN_1> OK <IBAN_1>"),
        ("ssh 192.168.1.17 and fe80::1ff:fe23:4567:890a", "ssh <ADDRESS_1> and <ADDRESS_2>"),
        ("mac 00:1A:2b:3c:4D:5e", "mac <ADDRESS_1>"),
        ("999.999.1.1 at 10:30:45 version 1.2.3", "999.999.1.1 at 10:30:45 version 1.2.3"),
        ("key AKIAIOSFODNN7EXAMPLE", "key <SECRET_1>"),
        ("token: hunter2hunter2", "token: <SECRET_1>"),
        ("my password is correct-horse", "my password is <SECRET_1>"),
        ("ghp_" + "a1B2" * 9 + " leaked", "<SECRET_1> leaked"),
        ("npm_" + "a1B2" * 9 + " and pypi-AgEIcHlwaS5vcmcCJDU", "<SECRET_1> and <SECRET_2>"),
        ("rep_k3J9xQ2a_" + "0fT1" * 8 + "_1bX9aD is ours", "<SECRET_1> is ours"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.c2ln", "<SECRET_1>"),
        (
            '{"password": "hunter2", "aws_secret_access_key": "wJalrXUt"}',
            '{"password": "<SECRET_1>", "aws_secret_access_key": "<SECRET_2>"}',
        ),
        ("Authorization: Bearer c2VjcmV0LXRva2VuLTE=", "Authorization: Bearer <SECRET_1>"),
        ("basic straightforwardness", "basic straightforwardness"),
        ("git clone https://ana:hunter2@git.example/x", "git clone https://ana:<SECRET_1>@git.example/x"),
        ("https://hooks.slack.com/services/T0/B0/xyz here", "<SECRET_1> here"),
        ("-----BEGIN PGP PRIVATE KEY BLOCK-----\nx\n-----END PGP PRIVATE KEY BLOCK-----\nbye", "<SECRET_1>\nbye"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", "<SECRET_1>"),
        ("in 2024 we sold 1234567 units for 12.50", "in 2024 we sold 1234567 units for 12.50"),
        ("nothing here 👩‍👩‍👧 :)", "nothing here 👩‍👩‍👧 :)"),
    ],
)
def test_personal_data_becomes_a_typed_surrogate(text: str, clean: str) -> None:
    assert Surrogates().replace(text) == clean


def test_one_value_is_one_surrogate_and_only_counts_are_kept() -> None:
    surrogates = Surrogates()
    assert surrogates.replace("a@b.co x@y.co A@B.CO") == "<EMAIL_1> <EMAIL_2> <EMAIL_1>"
    assert surrogates.counts == {"EMAIL": 3}
    assert surrogates.replace(surrogates.replace("pin: 12345")) == "pin: <SECRET_1>"


def test_checksums() -> None:
    assert is_card("5500-0000-0000-0004")
    assert not is_card("0000000000000000")
    assert is_iban("GB82 WEST 1234 5698 7654 32")
    assert not is_iban("GB82 WEST 1234 5698 7654 33")


def test_surrogates_are_in_the_conversations_and_in_the_report() -> None:
    entries = [say("bob", "your mail?", 0), say("carl", "hm", 0.5), say("ana", "me.too@b.co", 1)]
    made = run(entries)
    assert shown(made.conversations[0])[-1] == "*<EMAIL_1>"
    assert made.report.surrogates == {"EMAIL": 1}
    assert "too" not in str(made.report.style)


def test_surrogates_are_in_system_prompts_too() -> None:
    said = [
        Entry("1", "0", "system", "system", "The user is a@b.co.", kind="prompt"),
        Entry("1", "1", "user", "user", "who am I?"),
        Entry("1", "2", "assistant", "assistant", "a@b.co"),
    ]
    made = dialogue(said)
    assert shown(made.conversations[0]) == ["#The user is <EMAIL_1>.", "who am I?", "*<EMAIL_1>"]
    assert made.report.surrogates == {"EMAIL": 2}
