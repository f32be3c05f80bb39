"""Voices that nobody trained: random adapters, as fast and as large as real ones, in folders as the service keeps."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from repertory.contracts import AdapterRef
from repertory.data.render import Renderer
from repertory.manifest import write_durably, write_manifest
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.base import Outline
from repertory.model.voices import METADATA, provenance


def random_voice(outline: Outline, seed: int, rank: int = 16) -> Adapter:
    """On all linear layers, in fp32; it changes what the base says, but not by much."""
    targets = sorted({name.rsplit(".", 1)[-1] for name in outline.layers})
    config = LoraConfig(outline.key.base_model, rank, alpha=32, dropout=0, target_modules=targets)
    generator = torch.Generator().manual_seed(seed)
    A, B = {}, {}
    for name, layer in outline.layers.items():
        into, out = layer.shape
        A[name] = torch.randn(rank, into, generator=generator) * into**-0.5
        B[name] = torch.randn(out, rank, generator=generator) * 0.002
    return Adapter(config, A, B)


def write_version(
    folder: Path,
    adapter: Adapter,
    outline: Outline,
    renderer: Renderer,
    fingerprint: str,
    org_id: str | None = None,
) -> AdapterRef:
    """The version whose name the folder has, as a finished run leaves it."""
    folder.mkdir(parents=True)
    metadata = provenance(folder.name, outline.key, fingerprint, renderer.template_sha256, system_prompt=None)
    write_durably(folder / METADATA, json.dumps(metadata).encode())
    write_manifest(folder, [*adapter.save(folder), METADATA])
    return ref_to(folder, org_id)


def ref_to(folder: Path, org_id: str | None = None) -> AdapterRef:
    """Of `org_id`, or of an organisation with the folder's name."""
    return AdapterRef(org_id=org_id or folder.name, training_id=folder.name, path=str(folder.resolve()))
