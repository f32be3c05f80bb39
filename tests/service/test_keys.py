"""API keys: made, shown once, used, rotated, revoked."""

from __future__ import annotations

import hashlib
import stat
import string
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import insert, select, update

from repertory.errors import Conflict, InvalidInput, NotFound, Unauthenticated
from repertory.service.keys import SHAPE, Keys, Scope, ServiceSecret, _checksum
from repertory.service.store import Store, api_keys, now, organisations
from repertory.settings import Settings

HOUR = timedelta(hours=1)


@pytest.fixture
def keys(store: Store, clean_settings: Settings) -> Keys:
    with store.write() as connection:
        connection.execute(insert(organisations).values(org_id="org", created_at=now()))
    return Keys(store, ServiceSecret(clean_settings))


@pytest.fixture
def make(keys: Keys) -> Callable[..., str]:
    def make(org_id: str | None = "org", expires_in: timedelta | None = None) -> str:
        return keys.create(name="bot", org_id=org_id, scopes=[Scope.INFER], expires_in=expires_in)[1]

    return make


def test_a_key_has_prefix_id_secret_and_checksum(keys: Keys) -> None:
    key, shown = keys.create(name="bot", org_id="org", scopes=[Scope.TRAIN, Scope.INFER])
    shape = SHAPE.fullmatch(shown)
    assert shape is not None
    assert shape[2] == key.id
    assert keys.verify(shown).scopes == (Scope.INFER, Scope.TRAIN)


def test_no_two_keys_are_alike(make: Callable[..., str]) -> None:
    assert len({make() for _ in range(20)}) == 20


def test_the_database_holds_neither_the_key_nor_its_hash_alone(store: Store, make: Callable[..., str]) -> None:
    shown = make()
    shape = SHAPE.fullmatch(shown)
    assert shape is not None
    with store.read() as connection:
        written = str(connection.execute(select(api_keys)).one())
    assert shape[2] in written
    assert shape[3] not in written
    for hashed in (shape[3], shown, f"{shape[2]}:{shape[3]}"):
        assert hashlib.sha256(hashed.encode()).hexdigest() not in written


def test_the_secret_is_made_once_and_for_its_owner_alone(
    make: Callable[..., str], clean_settings: Settings, keys: Keys
) -> None:
    first = make()
    path = clean_settings.api_key_secret_file
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    make()
    assert path.read_bytes() == before
    assert len(before) == 64
    assert keys.verify(first)


def test_a_setting_takes_the_place_of_the_file(store: Store, keys: Keys, clean_settings: Settings) -> None:
    given = Settings(api_key_secret="s" * 32)
    with_setting = Keys(store, ServiceSecret(given))
    _, shown = with_setting.create(name="bot", org_id="org", scopes=[Scope.INFER])
    assert with_setting.verify(shown)
    assert not clean_settings.api_key_secret_file.exists()
    with pytest.raises(Unauthenticated):  # made with another secret
        Keys(store, ServiceSecret(Settings(api_key_secret="t" * 32))).verify(shown)


def test_a_lost_secret_is_no_reason_to_make_another(make: Callable[..., str], keys: Keys) -> None:
    make()
    Settings().api_key_secret_file.unlink()
    with pytest.raises(Conflict) as refused:
        keys.check_secret()
    assert refused.value.code == "api_key_secret_missing"
    with pytest.raises(Conflict):
        make()


def test_any_wrong_character_is_refused(make: Callable[..., str], keys: Keys) -> None:
    shown = make()
    for at, character in enumerate(shown):
        other = "x" if character != "x" else "y"
        with pytest.raises(Unauthenticated):
            keys.verify(shown[:at] + other + shown[at + 1 :])
    for wrong in ("", shown[:-1], f"{shown}a", f" {shown}", shown.swapcase(), "rep_", "none is needed"):
        with pytest.raises(Unauthenticated):
            keys.verify(wrong)


def test_a_typing_error_is_seen_without_the_database(
    make: Callable[..., str], keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = make()
    wrong = shown[:-8] + string.digits.replace(shown[-8], "")[0] + shown[-7:]
    monkeypatch.delattr(Store, "read")
    with pytest.raises(Unauthenticated) as refused:
        keys.verify(wrong)
    assert "mistyped" in refused.value.message


def test_the_id_of_one_key_does_not_go_with_the_secret_of_another(make: Callable[..., str], keys: Keys) -> None:
    one, other = SHAPE.fullmatch(make()), SHAPE.fullmatch(make())
    assert one is not None
    assert other is not None
    body = f"rep_{one[2]}_{other[3]}"
    with pytest.raises(Unauthenticated) as refused:
        keys.verify(f"{body}_{_checksum(body)}")
    assert refused.value.message == "The API key is not known here."


def test_an_expired_key_is_refused_and_says_so(make: Callable[..., str], keys: Keys) -> None:
    assert keys.verify(make(expires_in=HOUR))
    with pytest.raises(Unauthenticated, match="expired"):
        keys.verify(make(expires_in=timedelta(0)))


def test_a_revoked_key_is_refused_from_then_on(make: Callable[..., str], keys: Keys) -> None:
    shown = make()
    key = keys.verify(shown)
    first = keys.revoke(key.id)
    with pytest.raises(Unauthenticated, match="revoked"):
        keys.verify(shown)
    assert keys.revoke(key.id).revoked_at == first.revoked_at
    assert keys.are_required()  # the service stays closed


def test_rotation_leaves_two_keys_for_a_while(make: Callable[..., str], keys: Keys) -> None:
    old_text = make(expires_in=HOUR)
    old = keys.verify(old_text)
    new, new_text = keys.rotate(old.id, timedelta(minutes=5))
    assert (new.name, new.org_id, new.scopes) == (old.name, old.org_id, old.scopes)
    assert new.expires_at is not None
    assert abs(new.expires_at - new.created_at - HOUR) < timedelta(seconds=1)
    assert keys.verify(old_text).id == old.id
    assert keys.verify(new_text).id == new.id
    assert keys.get(old.id).expires_at <= now() + timedelta(minutes=5)  # type: ignore[operator]
    at_once = keys.rotate(new.id, timedelta(0))[1]
    with pytest.raises(Unauthenticated):
        keys.verify(new_text)
    assert keys.verify(at_once)
    with pytest.raises(Conflict):
        keys.rotate(new.id, timedelta(0))


def test_rotation_never_makes_a_key_live_longer(make: Callable[..., str], keys: Keys) -> None:
    old = keys.verify(make(expires_in=HOUR))
    keys.rotate(old.id, timedelta(days=30))
    assert keys.get(old.id).expires_at == old.expires_at


def test_the_last_use_is_noted_once_a_minute(make: Callable[..., str], keys: Keys, store: Store) -> None:
    shown = make()
    key = keys.verify(shown)
    first = keys.get(key.id).last_used_at
    assert first is not None
    keys.verify(shown)
    assert keys.get(key.id).last_used_at == first
    with store.write() as connection:
        connection.execute(update(api_keys).values(last_used_at=first - timedelta(seconds=61)))
    keys.verify(shown)
    later = keys.get(key.id).last_used_at
    assert later is not None
    assert later >= first


def test_another_organisations_key_is_not_there(make: Callable[..., str], keys: Keys) -> None:
    key = keys.verify(make())
    for call in (keys.get, keys.revoke):
        with pytest.raises(NotFound):
            call(key.id, "other")
    with pytest.raises(NotFound):
        keys.rotate(key.id, HOUR, "other")
    assert keys.list("other") == []
    assert [one.id for one in keys.list("org")] == [key.id]
    assert keys.get(key.id).state == "active"


@pytest.mark.parametrize(
    ("org_id", "scopes", "error"),
    [
        ("org", [], InvalidInput),
        ("org", [Scope.ADMIN], InvalidInput),
        (None, [Scope.ORG_ADMIN], InvalidInput),
        ("nobody", [Scope.INFER], NotFound),
    ],
)
def test_what_no_key_can_be(keys: Keys, org_id: str | None, scopes: list[Scope], error: type[Exception]) -> None:
    with pytest.raises(error):
        keys.create(name="bot", org_id=org_id, scopes=scopes)
    assert not keys.are_required()


def test_processes_that_make_the_first_key_at_once_share_a_secret(clean_settings: Settings) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = {*threads.map(lambda _: ServiceSecret(clean_settings).make(), range(8))}
    assert made == {clean_settings.api_key_secret_file.read_bytes()}
    assert [path.name for path in clean_settings.api_key_secret_file.parent.iterdir()] == ["api_key_secret"]


def test_rows_are_what_the_list_shows(make: Callable[..., str], store: Store, keys: Keys) -> None:
    make()
    make(None)
    with store.read() as connection:
        stored = connection.execute(select(api_keys.c.id)).scalars().all()
    assert {key.id for key in keys.list()} == set(stored)
