"""N voices cost one base model and N small adapters."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from benchmarks.memory import SHAPES, compare
from benchmarks.voices import random_voice, write_version

from repertory.contracts import BUNDLED_MODEL, AdapterRef, BaseKey
from repertory.model import base as base_module
from repertory.model.adapter import WEIGHTS, Adapter
from repertory.model.voices import read_voice
from repertory.settings import Settings

pytestmark = pytest.mark.slow

VOICES = 16


def test_sixteen_voices_take_the_memory_of_one_base_and_sixteen_adapters(tmp_path: Path) -> None:
    device = base_module.detect_device()
    settings = Settings()
    key = BaseKey.resolve(BUNDLED_MODEL, settings.hyperparameters, device)
    base = base_module.load(BUNDLED_MODEL, settings, device, key, print)
    refs = [
        write_version(tmp_path / f"train_{at}", random_voice(base, at), base, base.renderer, base.fingerprint)
        for at in range(VOICES)
    ]
    adapter_bytes = (tmp_path / "train_0" / WEIGHTS).stat().st_size

    def memory() -> int:
        if device.kind == "cuda":
            return torch.cuda.memory_allocated()
        return int(psutil.Process().memory_info().rss)

    def in_slot(ref: AdapterRef) -> Adapter:
        return read_voice(ref, base).adapter.to(base.device, base.dtype)

    held = [in_slot(refs[0])]
    with_one = memory()
    held += [in_slot(ref) for ref in refs[1:]]
    with_all = memory()
    print(
        f"one voice {with_one / 1e6:.0f} MB, {VOICES} voices {with_all / 1e6:.0f} MB, file {adapter_bytes / 1e6:.1f} MB"
    )
    in_memory = adapter_bytes // 2 if base.dtype.itemsize == 2 else adapter_bytes  # the files are fp32
    assert with_all <= 1.1 * with_one + VOICES * in_memory


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
