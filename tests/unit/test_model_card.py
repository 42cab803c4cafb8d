"""The model card: front matter that the Hub reads, and file content escaped for Markdown and HTML."""

from pathlib import Path

import pytest
import torch
import yaml

from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_card import plain, repository_of
from lowrank_dist.formats.provenance import Provenance, read_provenance
from lowrank_dist.methods.lora.files import AdapterFactors, LowRankFactor
from lowrank_dist.methods.lora.folder import adapter_card as model_card

TRAINING = {
    "step": 20,
    "epoch": 1.5,
    "tokens": 4000,
    "data": {"path": "d.jsonl", "sha256": "ab12", "samples": 9},
    "loss": 1.25,
    "eval_loss": None,
}


def adapter(base: str) -> AdapterFactors:
    factor = LowRankFactor(torch.ones(2, 3), torch.ones(4, 2), 4.0)
    return AdapterFactors({"model.layers.0.self_attn.q_proj": factor}, 0.0, False, False, base)


def test_front_matter_and_facts() -> None:
    card = model_card(
        "mine", adapter("org/model-1.5"), Provenance("f" * 64, "/b", {"lora": {}}, training=TRAINING), None
    )
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/model-1.5" and front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-generation" and front["tags"] == ["lora", "lowrank_dist"]
    for part in ("f" * 64, "| Step | 20 |", "| Epochs | 1.5 |", "ab12", "1.25", "vllm serve", "lowrank-dist merge"):
        assert part in card
    assert "Evaluation loss" not in card


@pytest.mark.parametrize("base", ["", "/models/llama", "a/b/c", "x\nlicense: mit", "../up", "a--b", "<b>"])
def test_what_is_no_repository(base: str) -> None:
    assert repository_of(base) is None
    assert "base_model" not in yaml.safe_load(model_card("x", adapter(base), None, None).split("---")[1])


def test_an_existing_folder_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert repository_of("org/model") == "org/model"
    Path("org/model").mkdir(parents=True)
    assert repository_of("org/model") is None


def test_text_is_never_markup() -> None:
    evil = "a`b|c\n# head <script>x</script> [l](http://e) ```"
    provenance = Provenance(evil, evil, {"k": evil}, training={"step": evil, "data": {"path": evil}, "loss": 10**400})
    card = model_card(evil, adapter(evil), provenance, None)
    shown = "\n".join(line for line in card.splitlines() if not line.startswith("    "))
    assert "<script>" not in shown and "\n# head" not in shown and "[l](" not in shown and "```" not in shown
    assert len(plain("x" * 10**6)) < 400
    assert [plain(text) for text in ("- a", "a--b", "_a_", "a -b")] == ["\\- a", r"a\-\-b", r"\_a\_", r"a \-b"]


def test_a_usual_name_is_shown_as_it_is() -> None:
    assert "\n# for-vllm_2\n" in model_card("for-vllm_2", adapter("org/my-model"), None, None)


def test_nesting_is_no_traceback() -> None:
    deep: dict[str, object] = {}
    for _ in range(600):
        deep = {"k": deep}
    assert "nested too deeply" in model_card("x", adapter(""), Provenance("f", "b", deep), 2)


def test_provenance_keeps_training(tmp_path: Path) -> None:
    path = tmp_path / "lowrank_dist.json"
    path.write_text(Provenance("f", "b", {}, training=TRAINING).to_json())
    assert read_provenance(tmp_path).training == TRAINING
    path.write_text(
        '{"format": 1, "base_fingerprint": "f", "base": "b", "config": {}, "created_by": "", "versions": {}}'
    )
    assert read_provenance(tmp_path).training == {}
    path.write_text(path.read_text()[:-1] + ', "training": []}')
    with pytest.raises(UserError, match="training must be an object"):
        read_provenance(tmp_path)
