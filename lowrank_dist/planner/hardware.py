"""GPUs and their links by data sheet, and the shares of these rates that a step reaches."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from lowrank_dist.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet. name: as `--gpu` takes it; a name without its form is the first of its model's forms.

    memory: bytes, as torch and nvidia-smi see them. flops: dense bf16 FLOP/s. bandwidth: of memory, B/s. node, network:
    one direction of the GPU's link to the others in its node, and to other nodes (its own NIC), B/s. form: SXM, PCIe or
    NVL; "" where there is one form. sold_as: GB by its name. bridged, bridge: the GPUs that an NVLink bridge joins, and
    one direction of it, B/s.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    node: float
    network: float
    form: str = ""
    sold_as: int = 0
    bridged: int = 0
    bridge: float = 0.0

    @property
    def model(self) -> str:
        return re.split("[- ]", self.name)[0]

    def link(self, members: int) -> float:
        """Return one direction of the link between `members` neighbours in a node, B/s."""
        return self.bridge if members <= self.bridged else self.node


def _gib(number: float) -> int:
    return int(number * 2**30)


# NVIDIA's data sheets; the usual form of a model comes first, and the model's bare name means it. Memory is what torch
# reports: less than the name says, and different by 0.1 to 0.3 GiB between drivers. Links of a node: NVLink (SXM), or
# PCIe of generation 4 (32 GB/s) or 5 (64); the bridges that are sold for A100 and H100 PCIe are not counted. One NIC a
# GPU, assumed: HDR (200 Gbit/s) for A100 and PCIe cards, NDR (400) for the other SXM forms, 100 Gbit/s for the rest.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", _gib(79.1), 312e12, 2.039e12, 300e9, 25e9, "SXM", 80),
        Gpu("a100-40gb", _gib(39.4), 312e12, 1.555e12, 300e9, 25e9, "SXM", 40),
        Gpu("a100-pcie", _gib(79.1), 312e12, 1.935e12, 32e9, 25e9, "PCIe", 80),
        Gpu("a100-pcie-40gb", _gib(39.4), 312e12, 1.555e12, 32e9, 25e9, "PCIe", 40),
        Gpu("a800", _gib(79.1), 312e12, 2.039e12, 200e9, 25e9, "SXM", 80),
        Gpu("h100", _gib(79.1), 989e12, 3.35e12, 450e9, 50e9, "SXM", 80),
        Gpu("h100-pcie", _gib(79.1), 756e12, 2e12, 64e9, 25e9, "PCIe", 80),
        Gpu("h100-nvl", _gib(93.1), 835e12, 3.9e12, 64e9, 25e9, "NVL", 94, 2, 300e9),
        Gpu("h800", _gib(79.1), 989e12, 3.35e12, 200e9, 50e9, "SXM", 80),
        Gpu("h20", _gib(95.0), 148e12, 4e12, 450e9, 50e9, "SXM", 96),
        Gpu("h20-141gb", _gib(139.7), 148e12, 4.8e12, 450e9, 50e9, "SXM", 141),
        Gpu("h200", _gib(139.7), 989e12, 4.8e12, 450e9, 50e9, "SXM", 141),
        Gpu("h200-nvl", _gib(139.7), 835e12, 4.8e12, 64e9, 25e9, "NVL", 141, 4, 450e9),
        Gpu("gh200", _gib(94.5), 989e12, 4e12, 450e9, 50e9, "", 96),
        Gpu("b200", _gib(178.3), 2250e12, 8e12, 900e9, 50e9, "SXM", 180),
        Gpu("gb200", _gib(184.3), 2500e12, 8e12, 900e9, 50e9, "", 186),
        Gpu("b300", _gib(267.6), 2250e12, 8e12, 900e9, 100e9, "SXM", 288),
        Gpu("l40s", _gib(44.4), 362e12, 0.864e12, 32e9, 25e9, "", 48),
        Gpu("l40", _gib(44.4), 181e12, 0.864e12, 32e9, 25e9, "", 48),
        Gpu("l4", _gib(22.0), 121e12, 0.3e12, 32e9, 12.5e9, "", 24),
        Gpu("a40", _gib(44.4), 149.7e12, 0.696e12, 32e9, 25e9, "", 48),
        Gpu("a10g", _gib(22.0), 70e12, 0.6e12, 32e9, 12.5e9, "", 24),
        Gpu("a10", _gib(22.0), 125e12, 0.6e12, 32e9, 12.5e9, "", 24),
        Gpu("a6000", _gib(47.4), 154.8e12, 0.768e12, 32e9, 12.5e9, "", 48),
        Gpu("rtx6000ada", _gib(47.4), 364.2e12, 0.96e12, 32e9, 12.5e9, "", 48),
        Gpu("rtx3090", _gib(23.6), 71e12, 0.936e12, 32e9, 12.5e9, "", 24),
        Gpu("rtx4090", _gib(23.5), 165.2e12, 1.008e12, 32e9, 12.5e9, "", 24),
        Gpu("rtx5090", _gib(31.3), 209.5e12, 1.792e12, 64e9, 12.5e9, "", 32),
    )
}
# Shares of the data sheet's rates: GEMMs and memory as measured on H100 and H200 (790 to 798 TFLOP/s; 3.0 and
# 4.3 TB/s); links assumed.
GEMM_SHARE, MEMORY_SHARE, LINK_SHARE = 0.8, 0.9, 0.8
# Seconds before a collective's first byte, assumed.
NODE_LATENCY, NETWORK_LATENCY = 15e-6, 40e-6
# CUDA context, NCCL's buffers and cuBLAS workspaces; the share of the rest that the allocator cannot use. Assumed.
OUTSIDE_TENSORS, FRAGMENTATION = 2 * 10**9, 0.03

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {f"{unit[0]}IB": 2 ** (10 * power) for power, unit in enumerate(_UNITS, start=1)}

_MOST_BYTES = 1 << 60


# Words of a name that say nothing of the model; names of one model in other words.
_NOISE = {"nvidia", "tesla", "geforce", "gpu", "hbm2", "hbm2e", "hbm3", "hbm3e", "generation", "ac"}
_SAME = (
    (re.compile(r"(?<![a-z\d])(\d{2,3})[ _]+(gb|gib)\b"), r"\1\2"),  # "A100 80 GB", as data sheets write it
    (re.compile(r"\brtx[ _-]*6000[ _-]*ada\b"), "rtx6000ada"),
    (re.compile(r"\brtx[ _-]*a6000\b"), "a6000"),
    (re.compile(r"\b(?:rtx[ _-]*)?([345]090)\b"), r"rtx\1"),
    (re.compile(r"\bh100[ _-]+80gb[ _-]+hbm3\b"), "h100-sxm-80gb"),  # NVIDIA's driver: the PCIe form has HBM2e
    (re.compile(r"\bh20[ _-]*3e\b"), "h20-141gb"),
    (re.compile(r"\b(gh200)[ _-]+(?:120|480)gb\b"), r"\1"),  # the driver names the memory of the CPU
)
# "gpu:a100:8(S:0-1)" and "gres/gpu:a100=8", as Slurm writes GPUs.
_GRES = re.compile(r"(?:gres[:/])?gpu[:/]([^:=()]+)(?:[:=]\d+)?(?:\(.*\))?|([^:=()]+):\d+")
_FORMS = {"sxm": "SXM", "hgx": "SXM", "dgx": "SXM", "pcie": "PCIe", "pci": "PCIe", "nvl": "NVL"}
_FORM, _SIZE = re.compile(r"(sxm)\d?|(hgx|dgx|pcie|pci|nvl)"), re.compile(r"(\d{2,3})(?:g|gb|gib)")
_MIG = re.compile(r"([1-7])g\.([1-9]\d{0,2})gb(?:\+\w+)*")
# A MIG device has so many eighths of the GPU's multiprocessors, and less memory than its name says.
_MIG_SLICES, _MIG_MEMORY = 8, 0.95


@dataclass(frozen=True)
class _Words:
    """The parts of a GPU's name. rest: words that belong to no known GPU. mig: slices and GB."""

    model: str = ""
    form: str = ""
    size: int = 0
    mig: tuple[int, int] | None = None
    rest: tuple[str, ...] = ()


def _words_of(name: str) -> _Words:
    """Return what the name says: as torch, a data sheet, Slurm or a person writes it."""
    text = name.strip().lower()
    if (gres := _GRES.fullmatch(text)) is not None:
        text = gres[1] or gres[2]
    for pattern, same in _SAME:
        text = pattern.sub(same, text)
    found = _Words()
    models = sorted({gpu.model for gpu in GPUS.values()}, key=len, reverse=True)
    for word in re.findall(r"[a-z0-9.+]+", text):
        model = next((known for known in models if word.startswith(known)), None) if not found.model else None
        if model is not None:
            found, word = replace(found, model=model), word.removeprefix(model)
        if (mig := _MIG.fullmatch(word)) is not None:
            found = replace(found, mig=(int(mig[1]), int(mig[2])))
        elif (form := _FORM.fullmatch(word)) is not None:
            found = replace(found, form=_FORMS[form[1] or form[2]])
        elif (size := _SIZE.fullmatch(word)) is not None:
            found = replace(found, size=int(size[1]))
        elif word and word not in _NOISE and word != "mig":
            found = replace(found, rest=(*found.rest, word))
    return found


def _forms(words: _Words, *, of_size: bool = True) -> list[Gpu]:
    """Return the known GPUs that a name may mean, the usual one first."""
    if words.rest:
        return []
    return [
        gpu
        for gpu in GPUS.values()
        if gpu.model == words.model
        and words.form in ("", gpu.form)
        and (not of_size or words.size in (0, gpu.sold_as))
        and (words.mig is None or words.mig[1] <= gpu.sold_as)
    ]


def _slice_of(gpu: Gpu, mig: tuple[int, int] | None) -> Gpu:
    """Return the GPU, or its MIG device. A MIG device has no link to others but through the host."""
    if mig is None:
        return gpu
    slices, gigabytes = mig
    share = slices / _MIG_SLICES
    return replace(
        gpu,
        name=f"{gpu.name} MIG {slices}g.{gigabytes}gb",
        memory=int(gigabytes * _MIG_MEMORY * 2**30),
        flops=gpu.flops * share,
        bandwidth=gpu.bandwidth * min(1, gigabytes / gpu.sold_as),
        node=min(gpu.node, 32e9),
        bridged=0,
    )


def gpu_of(name: str) -> Gpu:
    """Return the GPU of that name: as `GPUS` has it, as torch reports it, or as Slurm's gres does.

    Where several forms have the name, it is the usual one; `other_forms` names the others. Raises UserError, which
    lists all known GPUs, for any other name.
    """
    words = _words_of(name)
    found = _forms(words)
    if found:
        return _slice_of(found[0], words.mig)
    near = next(iter(_forms(replace(words, rest=(), size=0)) or _forms(replace(words, rest=(), size=0, form=""))), None)
    close = [near.name] if near is not None else difflib.get_close_matches(name.lower(), GPUS, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"--gpu: {name!r} is not known: {meant}There are {', '.join(GPUS)}; for another GPU name the one that is most "
        "like it, and give its memory with --gpu-memory"
    )


def other_forms(gpu: Gpu) -> list[str]:
    """Return the names of the other forms and sizes of a GPU's model."""
    own = (gpu.form, gpu.sold_as)
    return [other.name for other in GPUS.values() if other.model == gpu.model and (other.form, other.sold_as) != own]


def bytes_in(text: str, option: str) -> int:
    """Return the bytes of "80GB" or "80 GiB". Raises UserError without a unit or a number above 0."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    size = 0.0 if match is None else float(match[1]) * _UNITS.get(match[2].upper(), 0)
    if match is None or not 0 < size < _MOST_BYTES:
        said = "has no unit" if match is not None and not match[2] else "is not a size"
        raise UserError(f"{option}: {text[:40]!r} {said}: write a number above 0 with a unit, as in 80GB or 80GiB")
    return int(size)


def usable(memory: int) -> int:
    """Return the bytes of a GPU's memory that tensors can use."""
    return int((memory - OUTSIDE_TENSORS) * (1 - FRAGMENTATION))


def gpu_called(device: str) -> Gpu | None:
    """Return the GPU that its driver calls `device` ("NVIDIA H100 80GB HBM3"); None if it is unknown.

    Another size than those that are known is passed over: it does not change the rates by much.
    """
    words = _words_of(device)
    found = _forms(words) or _forms(words, of_size=False)
    return _slice_of(found[0], words.mig) if found else None


def peak_flops(device: str) -> float | None:
    """Return dense bf16 FLOP/s of the GPU that its driver calls `device`; None if it is unknown."""
    gpu = gpu_called(device)
    return None if gpu is None else gpu.flops
