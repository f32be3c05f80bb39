"""A checkpoint is whole or not there, wherever in its writing the process dies."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repertory.model.checkpoint import Checkpoint


class Killed(BaseException):
    """Nothing is cleared up after it, as after kill -9."""


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, "fingerprint", {"step": step}, {"A.weight": torch.full((4,), float(step))})


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch, write: Callable[[], None]) -> bool:
    """Whether `write` was killed: just before the given one of the calls by which bytes and names become durable."""
    calls = itertools.count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*about: Any, **more: Any) -> Any:
            if next(calls) == number:
                raise Killed
            return call(*about, **more)

        return maybe

    with monkeypatch.context() as patched:
        for name in ("fsync", "rename", "replace", "rmdir", "mkdir"):
            patched.setattr(os, name, counted(getattr(os, name)))
        try:
            write()
        except Killed:
            return True
    return False


@pytest.mark.fault("F2")
def test_a_kill_anywhere_in_the_writing_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for number in itertools.count():
        folder = tmp_path / str(number)
        for step in (1, 2):
            checkpoint(step).write(folder)
        was_killed = killed_at(number, monkeypatch, lambda folder=folder: checkpoint(3).write(folder))  # type: ignore[misc]
        newest = Checkpoint.newest(folder, "fingerprint")
        assert newest is not None
        assert newest.story == {"step": newest.step}
        assert newest.tensors["A.weight"].tolist() == [float(newest.step)] * 4
        found.append(newest.step)
        checkpoint(3).write(folder)  # the next attempt, over what is left
        again = Checkpoint.newest(folder, "fingerprint")
        assert again is not None
        assert again.step == 3
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-3"]
        if not was_killed:
            break
    assert len(found) > 8
    assert found == sorted(found)  # the one before until the very moment that the new one is whole
    assert set(found) == {2, 3}
