"""glassllm's conversion, against the numpy model and tokenizer in its own wheel."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.quickstart.wheels import CACHE, GLASSLLM, extract, fetch
from tests.real_models import glassllm_folder, halves_from_pairs

TEXT = "“You are quite right, Watson,” said he.\nThe  door — was shut;  and I cañnot say more."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glassllm_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory):
    """Return the wheel's own (model, tokenizer), which need only numpy and are imported from the zip file."""
    weights = tmp_path_factory.mktemp("weights")
    wheel = fetch(GLASSLLM, CACHE)
    for name in ("en.npz", "en.tokenizer.json"):
        extract(wheel, f"glassllm/weights/{name}", weights / name)
    sys.path.insert(0, str(wheel))
    try:
        from glassllm.model import GlassLM
        from glassllm.tokenizer import Tokenizer
    finally:
        sys.path.remove(str(wheel))
    return GlassLM.load(weights / "en.npz"), Tokenizer.load(weights / "en.tokenizer.json")


def logits(folder: Path, ids: list[int], undo: bool = False) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    if undo:  # the negative control: q and k are permuted once more
        state = load_file(folder / "model.safetensors")
        for name, weight in state.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                state[name] = halves_from_pairs(weight, model.config.head_dim)
        model.load_state_dict(state, strict=False)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits.numpy()


def test_tokenizer_is_the_wheels(folder, original):
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = original[1].encode(TEXT)
    assert tokenizer(TEXT)["input_ids"] == ids
    assert original[1].unk_id in ids
    assert tokenizer.decode(tokenizer("  a b\nc")["input_ids"]) == "  a b\nc"


def test_logits_are_the_wheels(folder, original):
    model, tokenizer = original
    ids = tokenizer.encode(TEXT)
    expected = model(ids).data
    assert np.abs(logits(folder, ids) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(logits(folder, ids, undo=True) - expected).max() > 1e-2 * np.abs(expected).max()
