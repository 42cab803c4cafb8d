"""Models of images and text: logits for text equal transformers', whatever the names of the tensors in the files."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.dist.ranks import run_ranks
from tests.dist.test_logits import BROKEN, TOLERANCE, all_logits, gap, tokens
from tests.tiny_models import make_tiny_with_images
from tests.unit.test_wrappers import KINDS, NEW_NAMES, renamed


@pytest.mark.parametrize("tensor", [1, 2])
def test_equal_transformers(tensor: int, tmp_path: Path) -> None:
    """Control: the logits of the other model."""
    folders: dict[str, str] = {}
    expected = {}
    for kind in KINDS:
        folder = make_tiny_with_images(kind, tmp_path / kind)
        folders |= {kind: str(folder), f"{kind}_new": str(renamed(folder, tmp_path / f"{kind}_new", NEW_NAMES))}
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            expected[kind] = model(input_ids=tokens(), use_cache=False).logits.double().numpy()
    for found in run_ranks(tensor, all_logits, folders, tensor, False, "fp32"):
        gaps = {name: gap(found[name], expected[name.removesuffix("_new")]) for name in folders}
        assert max(gaps.values()) <= TOLERANCE, gaps
        assert gap(found["gemma3"], expected["mistral3"]) > BROKEN
