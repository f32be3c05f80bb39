"""Which base models a caller may name: those of the hub or the cache by name, nothing outside the cache by path, and
none of an architecture that is known not to be supported.
"""

from __future__ import annotations

import re
from pathlib import Path

from repertory import architectures
from repertory.errors import InvalidInput
from repertory.settings import Settings

# `name` or `org/name`. A part neither begins with a dot (`..`) nor with a dash (it becomes a command's argument).
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
MAX_CHARACTERS = 256


def allowed_base_model(asked: str, settings: Settings) -> str:
    """The name under which a host finds it. Raises InvalidInput for everything that could leave the cache."""
    if asked == settings.default_base_model:
        return asked  # the operator may have set a path of any kind
    if len(asked) <= MAX_CHARACTERS and "\x00" not in asked:
        if NAME.fullmatch(asked) and ".." not in asked:
            return asked
        inside = _name_inside(settings.model_cache_dir.resolve(), asked)
        if inside is not None:
            return inside
    raise InvalidInput(
        "base_model is neither the name of a model nor a folder in the model cache.",
        code="base_model_not_allowed",
        cure="Use a Hugging Face name such as TinyLlama/TinyLlama-1.1B-Chat-v1.0, or put the model's folder into"
        " MODEL_CACHE_DIR and use its name there. Leave base_model out for the default.",
        param="base_model",
    )


def check_architecture(name: str, settings: Settings) -> None:
    """Of a base model whose folder is here; what must first be downloaded is for its host to check.

    Raises InvalidInput.
    """
    if problem := architectures.problem_with(name, settings.model_cache_dir / name, settings):
        raise InvalidInput(problem, code=architectures.CODE, cure=architectures.CURE, param="base_model")


def _name_inside(cache: Path, asked: str) -> str | None:
    """Of a path that, with all links followed, lies in the cache."""
    if "://" in asked:
        return None
    path = Path(asked).resolve()
    return str(path.relative_to(cache)) if path != cache and path.is_relative_to(cache) else None
