"""llama.cpp's own converters, from the source distribution of llama-cpp-python (77 MB, downloaded once by pip)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import torch

from launch.quickstart.wheels import CACHE, Wheel, fetch

SOURCE = Wheel(
    requirement="llama-cpp-python==0.3.36",
    file="llama_cpp_python-0.3.36.tar.gz",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    licence="MIT",
)
_HOME = "llama_cpp_python-0.3.36/vendor/llama.cpp"
_PARTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/")
# The converters identify a vocabulary's pre-tokenizer by its hash and refuse unknown ones. No tensor depends on it, so
# the tiny models get any known one. One process converts everything: importing torch takes longer than all of it.
_DRIVER = """
import json, runpy, sys
home, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [home, f"{home}/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
refused = {}
for script, *arguments in jobs:
    sys.argv = [f"{home}/{script}", "--outtype", "f32", *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except (Exception, SystemExit) as error:
        refused[arguments[-1]] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(refused))
"""


def converters(cache: Path = CACHE) -> Path:
    """Return the folder of the converters, unpacked from the archive where it is not there yet.

    Raises UserError when pip cannot download it; tests that need it then fail with that message.
    """
    home = cache / "llama_cpp_python-0.3.36"
    if not home.is_dir():
        archive = fetch(SOURCE, cache)
        with tempfile.TemporaryDirectory(dir=cache) as folder, tarfile.open(archive) as source:
            wanted = tuple(f"{_HOME}/{part}" for part in _PARTS)
            members = [member for member in source if member.name.startswith(wanted)]
            source.extractall(folder, members, filter="data")
            os.replace(Path(folder) / _HOME, home)
    return home


def lora_job(base: Path, adapter: Path, out: Path) -> list[str]:
    """Return the arguments that convert an adapter of `base`."""
    return ["convert_lora_to_gguf.py", "--outfile", str(out), "--base", str(base), str(adapter)]


def model_job(folder: Path, out: Path) -> list[str]:
    """Return the arguments that convert a model folder."""
    return ["convert_hf_to_gguf.py", "--outfile", str(out), str(folder)]


def convert(jobs: Sequence[list[str]]) -> dict[str, str]:
    """Run the converters, in fp32; return folder → error of those that they refused."""
    command = [sys.executable, "-c", _DRIVER, str(converters()), json.dumps(jobs)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Gguf:
    """One GGUF file: its tensors, in fp32, and its metadata of an adapter."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        arch, alpha = reader.get_field("general.architecture"), reader.get_field("adapter.lora.alpha")
        assert arch is not None
        self.family: str = arch.contents()
        self.alpha: float | None = None if alpha is None else alpha.contents()
        # A file of fp32 holds a matrix [out, in] as it is; its `shape` has the reverse order.
        self.tensors = {each.name: torch.from_numpy(each.data.copy()) for each in reader.tensors}
        model = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family)
        self._names = gguf.get_tensor_name_map(model, 64)

    def name(self, hf: str) -> str:
        """Return llama.cpp's name of a Hugging Face tensor."""
        name = self._names.get_name(hf, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf
        return name

    def update(self, module: str) -> torch.Tensor:
        """Return ΔW [out, in] of a module as llama.cpp applies it: alpha / (r of B), no scale at all for an alpha of 0.

        The formula is that of `llama_adapter_lora_weight::get_scale`.
        """
        name = self.name(f"{module}.weight")
        a, b = (self.tensors[f"{name}.lora_{side}"].double() for side in "ab")
        return (self.alpha / b.size(1) if self.alpha else 1.0) * (b @ a)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of q or k [heads · d, in] in llama.cpp's order for llama: row i of a head beside row i + d/2."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
