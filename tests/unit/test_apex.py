"""Detection and use of an installed apex. NVIDIA's needs a GPU; a stand-in has its interface here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lowrank_dist.backend import apex
from lowrank_dist.engine.assemble import choose_kernels, describe_kernels
from lowrank_dist.errors import UserError
from lowrank_dist.model.layers import FrozenNorm
from lowrank_dist.ops import extension

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODULES = ("apex", "amp_C", "fused_layer_norm_cuda")
EXTENSIONS = {"amp_C.py": "", "fused_layer_norm_cuda.py": ""}
# Copied from NVIDIA/apex at 6424da3: the constructors, and the loop over parameter groups in FusedAdam.
NVIDIA = {
    "apex/__init__.py": "from . import normalization, optimizers",
    "apex/normalization/__init__.py": """
import fused_layer_norm_cuda
import torch
from torch import nn
from torch.nn import functional as F

class FusedLayerNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        self.normalized_shape, self.eps = torch.Size((normalized_shape,)), eps
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))

    def forward(self, input):
        assert input.dtype == self.weight.dtype == self.bias.dtype
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

class FusedRMSNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(normalized_shape))

    def forward(self, input):
        assert input.dtype == self.weight.dtype
        wide = input.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(input.dtype)
""",
    "apex/optimizers/__init__.py": """
import amp_C
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        defaults = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode
        self.param_groups_master = [{"params": [None for _ in group["params"]]} for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for group, master in zip(self.param_groups, self.param_groups_master):
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for p, _ in zip(group["params"], master["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p).float(), torch.zeros_like(p).float()
                grad = p.grad if self.adam_w_mode else p.grad + decay * p
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                mean, square = state["exp_avg"] / (1 - beta1 ** group["step"]), state["exp_avg_sq"]
                update = mean / ((square / (1 - beta2 ** group["step"])).sqrt() + group["eps"])
                p.sub_(lr * (update + (decay * p if self.adam_w_mode else 0)))
""",
    "apex-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.1\n"
    "Summary: PyTorch Extensions written by NVIDIA\n",
}
# The package that `pip download apex` gets: apex-0.9.10dev.
PYPI = {
    "apex/__init__.py": "raise AssertionError('an unrelated package was run')",
    **{
        f"apex/{name}.py": "" for name in ("decorators", "exceptions", "forms", "i18n", "interfaces", "models", "views")
    },
    "apex-0.9.10.dev0.dist-info/METADATA": "Metadata-Version: 1.1\nName: apex\nVersion: 0.9.10.dev0\n"
    "Summary: Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions\n",
}

Installed = Callable[[dict[str, str]], Path]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Installed]:
    """Return a function that puts files first on Python's path. An apex of this environment is set aside."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in MODULES}
    apex.installed_apex.cache_clear()

    def put(files: dict[str, str]) -> Path:
        monkeypatch.syspath_prepend(write(tmp_path, files))
        return tmp_path

    yield put
    apex.use_plain(False)
    apex.installed_apex.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def on_cpu(install: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the stand-in usable, on a CPU too."""
    install(NVIDIA | EXTENSIONS)
    taken = apex._taken
    monkeypatch.setattr(apex, "_taken", lambda device: taken("cuda"))


def test_no_apex(monkeypatch: pytest.MonkeyPatch, install: Installed) -> None:
    monkeypatch.setattr(sys, "path", [str(install({}))])
    found = apex.find_apex()
    assert (found.which, found.version, found.usable) == ("none", None, False)
    assert "not installed" in found.reason and apex.BUILD in found.reason


def test_pypis_apex_is_named_and_not_run(install: Installed) -> None:
    install(PYPI)
    found = apex.find_apex()
    assert (found.which, found.version, found.usable) == ("unrelated", "0.9.10.dev0", False)
    said = ("not NVIDIA's", "Pyramid toolkit", "`pip uninstall apex`", "github.com/NVIDIA/apex", "APEX_CUDA_EXT=1")
    assert [part for part in said if part not in found.reason] == [] and "\n" not in found.reason
    assert "apex" not in sys.modules
    # The control: importing this package raises.
    with pytest.raises(AssertionError, match="unrelated"):
        __import__("apex")


@pytest.mark.parametrize("files", [{"apex.py": ""}, {"apex/__init__.py": ""}, {"apex/README.md": ""}])
def test_something_else_called_apex_is_named_by_its_place(install: Installed, files: dict[str, str]) -> None:
    folder = install(files)
    found = apex.find_apex()
    assert (found.which, found.version, found.usable) == ("unrelated", None, False)
    assert str(folder) in found.reason and "pip uninstall" not in found.reason


def test_metadata_of_another_place_is_not_taken(install: Installed) -> None:
    """NVIDIA's clone stands on the path before PyPI's installed package; it must not be reported as version 0.9.10."""
    folder = install({f"site/{name}": text for name, text in PYPI.items()} | NVIDIA)
    (folder / "apex-0.1.dist-info/METADATA").unlink()
    (folder / "apex-0.1.dist-info").rmdir()
    sys.path.insert(1, str(folder / "site"))
    try:
        found = apex.find_apex()
    finally:
        sys.path.remove(str(folder / "site"))
    assert (found.which, found.version) == ("nvidia", None) and "unknown version" in found.reason


@pytest.mark.parametrize("built", [(), ("amp_C.py",), ("fused_layer_norm_cuda.py",)])
def test_nvidias_without_its_extensions(install: Installed, built: tuple[str, ...]) -> None:
    install(NVIDIA | {name: "" for name in built})
    found = apex.find_apex()
    assert (found.which, found.version, found.usable) == ("nvidia", "0.1", False)
    for name in EXTENSIONS:
        assert (name.removesuffix(".py") in found.reason.split(";")[0]) == (name not in built)
    assert apex.BUILD in found.reason and "apex" not in sys.modules


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("amp_C.py", "raise ImportError('undefined symbol:\\n_ZN3c10')", "ImportError: undefined symbol: _ZN3c10"),
        ("apex/__init__.py", "raise RuntimeError('no')", "RuntimeError: no"),
        ("apex/normalization/__init__.py", "class FusedLayerNorm: pass", "FusedRMSNorm"),
    ],
)
def test_nvidias_that_does_not_import(install: Installed, file: str, text: str, said: str) -> None:
    install(NVIDIA | EXTENSIONS | {file: text})
    found = apex.find_apex()
    assert (found.which, found.usable) == ("nvidia", False)
    assert said in found.reason and apex.BUILD in found.reason and "\n" not in found.reason


def test_a_usable_one_is_taken_on_cuda_alone(install: Installed) -> None:
    install(NVIDIA | EXTENSIONS)
    assert apex.find_apex() == apex.Apex("nvidia", "0.1", True, "NVIDIA's apex 0.1")
    for kind in ("RMSNorm", "LayerNorm"):
        assert apex.norm_class(kind, "cuda").__module__ == "apex.normalization"
        assert apex.norm_class(kind, "cpu") is getattr(nn, kind)
    assert apex.adamw("cuda").func.__module__ == "apex.optimizers"
    assert apex.adamw("cpu") is torch.optim.AdamW
    assert apex.describe("cuda") == "norms and AdamW from NVIDIA's apex 0.1"
    assert apex.describe("cpu").startswith("norms and AdamW from PyTorch")


@pytest.mark.parametrize("files", [PYPI, NVIDIA])
def test_one_that_is_not_usable_is_not_taken(install: Installed, files: dict[str, str]) -> None:
    install(files)
    assert apex.norm_class("RMSNorm", "cuda") is nn.RMSNorm and apex.adamw("cuda") is torch.optim.AdamW
    assert apex.describe("cuda") == f"norms and AdamW from PyTorch: {apex.find_apex().reason}"


def test_on_a_cpu_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "installed_apex", lambda: pytest.fail("looked for apex"))
    assert apex.norm_class("LayerNorm", "cpu") is nn.LayerNorm and apex.adamw("cpu") is torch.optim.AdamW
    assert choose_and_describe("auto", "cpu") == [extension.describe("cpu")]


def test_importing_it_imports_nothing() -> None:
    code = "import sys, lowrank_dist.backend.apex; sys.exit(bool({'apex', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- norms -----------------------------------------------------------------------------------------------------------


def frozen_norm(kind: str, dtype: torch.dtype, eps: float = 0.3) -> nn.Module:
    config = SimpleNamespace(normalization=kind, params_dtype=dtype, layernorm_zero_centered_gamma=False)
    norm = FrozenNorm(config, hidden_size=24, eps=eps)
    with torch.no_grad():
        for index, parameter in enumerate(norm.parameters()):
            parameter.copy_(torch.linspace(-1, 2, 24).roll(index))
    return norm.requires_grad_(False)


def output_and_gradient(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y = norm(x)
    y.backward(torch.ones_like(y))
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_frozen_norms_agree(kind: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    plain = frozen_norm(kind, dtype)
    assert type(plain) is getattr(nn, kind)
    expected = output_and_gradient(plain, dtype)
    request.getfixturevalue("on_cpu")
    fused = frozen_norm(kind, dtype)
    assert type(fused).__name__ == f"Fused{kind}" and {p.dtype for p in fused.parameters()} == {dtype}
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for got, wanted in zip(output_and_gradient(fused, dtype), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    # The control: a lost ε is noticed.
    lost = output_and_gradient(frozen_norm(kind, dtype, eps=1e-5), dtype)[0]
    assert not torch.allclose(lost, expected[0], rtol=0.02, atol=0.02)


# --- AdamW -----------------------------------------------------------------------------------------------------------


def after_steps(build: Callable[..., torch.optim.Optimizer]) -> tuple[list[Tensor], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(1)
    a, b = (nn.Parameter(torch.randn(7, generator=generator)) for _ in range(2))
    groups = [{"params": [a], "weight_decay": 0.5}, {"params": [b], "weight_decay": 0.0}]
    optimiser = build(groups, lr=0.0, betas=(0.8, 0.95), eps=1e-3)
    for step in range(3):
        for parameter in (a, b):
            parameter.grad = torch.randn(7, generator=generator)
        for group in optimiser.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimiser.step()
    return [a.detach(), b.detach()], optimiser


def test_adamw_agrees(on_cpu: None) -> None:
    expected, reference = after_steps(torch.optim.AdamW)
    got, optimiser = after_steps(apex.adamw("cpu"))
    torch.testing.assert_close(got, expected)
    for one, other in zip(optimiser.state.values(), reference.state.values(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(one[name], other[name])
    # The control: Adam's coupled weight decay gives another result.
    coupled, _ = after_steps(lambda *args, **kwargs: apex.adamw("cpu")(*args, **kwargs | {"adam_w_mode": False}))
    assert not torch.allclose(coupled[0], expected[0], rtol=1e-3)


ZERO = """
import sys, torch, torch.distributed as dist
from torch import nn
from lowrank_dist.backend import apex, libraries, select
from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser
from lowrank_dist.parallel.topology import Topology

libraries.quiet_libraries()
select.select_backend("cpu")
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
topology = Topology.build(1, 1, False, 60)
taken = apex._taken

def train(stage, fused):
    apex._taken = (lambda device: taken("cuda")) if fused else taken
    theta = [nn.Parameter(torch.linspace(-1, 1, size)) for size in (5, 8, 3, 6)]
    for index, parameter in enumerate(theta):
        parameter.tp_partial_grad = index % 2 == 0
        parameter.tensor_model_parallel = index % 2 == 1
    zero = ZeroOptimiser(theta, topology, OptimiserRules(stage, 0.5, None, 0.1, (0.8, 0.95), 1e-3))
    for step in range(3):
        for last in (False, True):
            zero.accumulate(lambda: sum((p * p * (i + 1)).sum() for i, p in enumerate(theta)), 0.25, last)
        zero.step(0.1 / (step + 1))
    inner = zero.engine.optimizer.optimizer
    assert type(inner).__name__ == ("FusedAdam" if fused else "AdamW"), type(inner)
    return torch.cat([p.detach() for p in theta])

start = torch.cat([torch.linspace(-1, 1, size) for size in (5, 8, 3, 6)])
for stage in (1, 2):
    expected, got = train(stage, False), train(stage, True)
    torch.testing.assert_close(got, expected)
    assert ((got - start).abs() > 1e-3).sum() >= 20, "both groups moved"
dist.destroy_process_group()
"""


def test_zero_takes_it(tmp_path: Path) -> None:
    """Run in a new process: DeepSpeed decides at import whether it accepts apex's optimiser."""
    packages = write(tmp_path / "packages", NVIDIA | EXTENSIONS)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(packages)!r})\n{ZERO}", str(tmp_path / "store")],
        cwd=ROOT,
        env=os.environ | {"LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- engine.kernels --------------------------------------------------------------------------------------------------


def choose_and_describe(kernels: str, device: str) -> list[str]:
    choose_kernels(kernels, device)
    return describe_kernels(kernels, device)


def test_auto_and_compiled_say_what_is_used(install: Installed) -> None:
    install(NVIDIA | EXTENSIONS)
    for kernels in ("auto", "compiled"):
        assert choose_and_describe(kernels, "cpu") == [extension.describe("cpu")]
        assert extension.compiled(torch.zeros(1))
    assert choose_and_describe("auto", "cuda") == [extension.describe("cuda"), apex.describe("cuda")]


def test_an_unrelated_apex_is_said_in_one_line_on_cuda_alone(install: Installed) -> None:
    install(PYPI)
    assert sum("pip uninstall apex" in line for line in choose_and_describe("auto", "cuda")) == 1
    assert not any("apex" in line for line in choose_and_describe("auto", "cpu"))


def test_compiled_is_refused_where_nothing_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        extension, "reason_not_loaded_on", lambda device: f"it was not built; build it with `{extension.INSTALL}`"
    )
    with pytest.raises(UserError, match="engine.kernels.*pip install --no-build-isolation"):
        choose_kernels("compiled", "cpu")
    choose_kernels("auto", "cpu")


def test_plain_leaves_out_everything_but_pytorch(install: Installed) -> None:
    install(NVIDIA | EXTENSIONS)
    try:
        assert choose_and_describe("plain", "cuda") == [
            "plain PyTorch operators, norms and AdamW (engine.kernels: plain)"
        ]
        assert not extension.compiled(torch.zeros(1))
        assert apex.norm_class("RMSNorm", "cuda") is nn.RMSNorm and apex.adamw("cuda") is torch.optim.AdamW
    finally:
        choose_kernels("auto", "cpu")
    # The control: without "plain" both are used.
    assert extension.compiled(torch.zeros(1)) and apex.norm_class("RMSNorm", "cuda") is not nn.RMSNorm
