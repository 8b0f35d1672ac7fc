"""Merges equal mergekit's, computed in float32 and written in bfloat16, from the configuration that unsleep writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.merges import agreement
from unsleep import MergeConfig

FAMILIES = ["llama", "qwen2", "gemma2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["", "0=0.9,2=0.1"])
def test_a_linear_merge_is_mergekits(tmp_path: Path, family: str, layers: str) -> None:
    found = agreement(tmp_path, family, MergeConfig(alpha=0.3, alpha_layers=layers))
    assert found.ulps <= 1
    assert found.identical > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spherical_merge_is_nuslerp_of_mergekit(tmp_path: Path, family: str) -> None:
    found = agreement(tmp_path, family, MergeConfig(alpha=0.3, method="slerp", base=str(tmp_path / "base")))
    assert found.ulps <= 1
    assert found.identical > 0.999
