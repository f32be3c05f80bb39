"""N voices cost one base model and N small adapters."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from benchmarks.memory import SHAPES, compare

from repertory.contracts import BUNDLED_MODEL, AdapterRef, BaseKey
from repertory.manifest import write_durably, write_manifest
from repertory.model import base as base_module
from repertory.model.base import Base
from repertory.model.lora import WEIGHTS, Adapter, LoraConfig
from repertory.model.voices import METADATA, Voices
from repertory.settings import Settings

pytestmark = pytest.mark.slow

VOICES = 16


def test_sixteen_voices_take_the_memory_of_one_base_and_sixteen_adapters(tmp_path: Path) -> None:

    device = base_module.detect_device()
    settings = Settings()
    key = BaseKey.resolve(BUNDLED_MODEL, settings.hyperparameters, device)
    base = base_module.load(BUNDLED_MODEL, settings, device, key, print)
    refs = [version(base, tmp_path / f"train_{at}", at) for at in range(VOICES)]
    adapter_bytes = (tmp_path / "train_0" / WEIGHTS).stat().st_size
    voices = Voices(base)

    def memory() -> int:
        if device.kind == "cuda":
            return torch.cuda.memory_allocated()
        return int(psutil.Process().memory_info().rss)

    voices.get(refs[0])
    with_one = memory()
    for ref in refs:
        voices.get(ref)
    with_all = memory()
    print(
        f"one voice {with_one / 1e6:.0f} MB, {VOICES} voices {with_all / 1e6:.0f} MB, file {adapter_bytes / 1e6:.1f} MB"
    )
    assert len(voices.training_ids) == VOICES
    in_memory = adapter_bytes // 2 if base.dtype.itemsize == 2 else adapter_bytes  # the files are fp32
    assert with_all <= 1.1 * with_one + VOICES * in_memory


def version(base: Base, folder: Path, seed: int) -> AdapterRef:
    """A version as training leaves it, with all linear layers at rank 16."""
    folder.mkdir()
    short = sorted({name.rsplit(".", 1)[-1] for name in base.layers})
    config = LoraConfig(base_model=BUNDLED_MODEL, rank=16, alpha=32, dropout=0, target_modules=short)
    names = Adapter.fresh(config, base.layers, list(base.layers), seed).save(folder)
    metadata = base.key.model_dump() | {"system_prompt": None}
    metadata |= {"template_sha256": base.renderer.template_sha256, "base_fingerprint": base.fingerprint}
    write_durably(folder / METADATA, json.dumps(metadata).encode())
    write_manifest(folder, [*names, METADATA])
    return AdapterRef(org_id="org", training_id=folder.name, path=str(folder))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_estimate_of_a_run_is_what_the_process_takes(dtype: str) -> None:
    """Resident memory within 25% of the estimate."""
    device = base_module.detect_device()
    if device.kind != "cpu":
        pytest.skip("resident memory is a CPU's")
    key = BaseKey.model_validate({"base_model": BUNDLED_MODEL, "quantization": "none", "dtype": dtype})
    base = base_module.load(BUNDLED_MODEL, Settings(), device, key, print)
    for shape in SHAPES:
        compared = compare(base, shape, 0.05)
        assert compared.measured_mb == pytest.approx(compared.estimated_mb, rel=0.25), compared
