"""Which base models a caller may name: those of the hub or the cache by name, nothing outside the cache by path, and
none that is known not to be supported.
"""

from __future__ import annotations

from pathlib import Path

from repertory import architectures
from repertory.catalogue import HUB_NAME, LOCAL, MAX_CHARACTERS, Catalogue, is_allowed, is_name
from repertory.errors import InvalidInput
from repertory.settings import Settings

# What is wrong with a base model itself, whoever asks and when: another one must be named. Anything else may pass: a
# hub comes back, a licence is accepted.
UNUSABLE = frozenset(
    {
        architectures.CODE,
        "base_model_not_found",
        "revision_not_found",
        "remote_code_required",
        "template_unusable",
        "unsafe_path",
        "unsafe_weights",
        "unsupported_quantization",
    }
)


def allowed_base_model(asked: str, settings: Settings) -> str:
    """The name under which a host finds it. Raises InvalidInput for everything that could leave the cache."""
    if asked == settings.default_base_model:
        return asked  # the operator may have set a path of any kind
    name = asked if is_name(asked) else _name_inside(settings.model_cache_dir.resolve(), asked)
    if name is None:
        raise InvalidInput(
            "base_model is neither the name of a model nor a folder in the model cache.",
            code="base_model_not_allowed",
            cure="Use a Hugging Face name such as TinyLlama/TinyLlama-1.1B-Chat-v1.0, if need be with @ and a branch,"
            " tag or commit; or the name of a model that `repertory models list` shows. Leave base_model out for the"
            " default.",
            param="base_model",
        )
    if not is_allowed(name, settings):
        raise InvalidInput(
            f"{name} is none of the base models that may be asked for here.",
            code="base_model_not_allowed",
            cure="Choose one that ALLOWED_BASE_MODELS names, ask the operator to add it, or leave base_model out.",
            param="base_model",
        )
    return name


def check_architecture(name: str, settings: Settings) -> None:
    """Of a base model whose folder is here. Raises InvalidInput."""
    folder = Catalogue(settings.model_cache_dir).folder(name)
    if folder is not None and (problem := architectures.problem_with(name, folder, settings)):
        raise InvalidInput(problem, code=architectures.CODE, cure=architectures.CURE, param="base_model")


def is_on_hub_alone(name: str, settings: Settings) -> bool:
    """Whether only a hub can tell what `name` is."""
    is_hubs = HUB_NAME.fullmatch(name.partition("@")[0]) is not None and not name.startswith(f"{LOCAL}/")
    return is_hubs and Catalogue(settings.model_cache_dir).folder(name) is None


def _name_inside(cache: Path, asked: str) -> str | None:
    """Of a path that, with all links followed, lies in the cache."""
    if "://" in asked or "\x00" in asked or len(asked) > MAX_CHARACTERS:
        return None
    path = Path(asked).resolve()
    return str(path.relative_to(cache)) if path != cache and path.is_relative_to(cache) else None
