"""The readers of user-supplied files: the file that each is fed, and the conditions under which its value is right.

A judge does not use the reader. It compares the value with Python's own reading of the file (`json`, `yaml`'s base
loader, safetensors' own header). For a configuration it checks two things: a changed key that changes no value must be
listed as without effect, and a changed value must have the type that belongs there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.backend.launchers import named_hostfile, set_rank_variables
from lowrank_dist.checkpoint.folder import read_checkpoint
from lowrank_dist.checkpoint.training_state import OptimizerReader, read_state
from lowrank_dist.config import load_config
from lowrank_dist.data.formats import Use, read_jsonl
from lowrank_dist.data.tokenizer import load_tokenizer
from lowrank_dist.engine.planning import find_model
from lowrank_dist.engine.reporter import keep_records
from lowrank_dist.formats.manifest import MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE
from lowrank_dist.formats.manifest import _text as manifest_text
from lowrank_dist.formats.model_folder import INDEX_FILE, SINGLE_FILE, open_checkpoint
from lowrank_dist.formats.provenance import PROVENANCE_FILE, read_provenance
from lowrank_dist.formats.safetensors_file import read_header
from lowrank_dist.formats.text_files import read_stop_ids
from lowrank_dist.merging.options import parse_adapter, parse_shard_size
from lowrank_dist.methods.bottleneck.files import read_bottlenecks
from lowrank_dist.methods.files import CONFIG_FILE, WEIGHTS_FILE
from lowrank_dist.methods.lora.files import read_adapter
from lowrank_dist.methods.lora.peft_config import read_config
from lowrank_dist.methods.prompt_files import read_prompt_learning
from tests import tiny_tokenizers
from tests.fuzz.mutations import differences, get, to_json
from tests.tiny_adapters import inspected, random_adapter, save_adapter
from tests.tiny_learned import save_checkpoint, save_learned
from tests.tiny_models import make_tiny

Built = Mapping[str, Path]
Place_ = Callable[[Built], Path]
# Keys that transformers keeps for training, generation or other models, and keys that other keys make void.
_CONFIG_IDLE = frozenset(
    "architectures bos_token_id eos_token_id pad_token_id dtype torch_dtype transformers_version initializer_range "
    "use_cache pretraining_tp attention_dropout return_dict output_hidden_states output_attentions init_std n_ctx "
    "chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type attn_pdrop embd_pdrop resid_pdrop "
    "dropout activation_dropout layerdrop summary_activation summary_first_dropout summary_proj_to_labels "
    "summary_type summary_use_proj max_window_layers sep_token_id cls_token_id decoder_start_token_id is_decoder "
    "tie_encoder_decoder reorder_and_upcast_attn".split()
)
_LEARNED_IDLE = frozenset(
    "task_type inference_mode prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path prefix_projection "
    "encoder_hidden_size num_transformer_submodules".split()
)


@dataclass(frozen=True)
class Reader:
    """One reader. file: the file it is fed. tree: that file as a tree. encode: a mutated tree as file content.

    judge: what is wrong with a value returned for a content, None where nothing is. modules: those whose branches are
    counted.
    """

    name: str
    file: Place_
    read: Callable[[Built], Any]
    modules: tuple[str, ...]
    tree: Callable[[Built], Any]
    encode: Callable[[Any, Built], bytes]
    judge: Callable[[Built, bytes, Any], str | None]

    def whole(self, built: Built) -> bytes:
        """Return the file as it was built; it lies beside the mutated one."""
        return beside(self.file(built)).read_bytes()

    def place(self, built: Built, content: bytes) -> None:
        self.file(built).write_bytes(content)


def beside(path: Path) -> Path:
    """Return the copy of a file that is never mutated."""
    return path.parent.parent / f"{path.parent.name}.{path.name}.whole"


def build(root: Path) -> Built:
    """Return name → folder of all files that are read, each reader's in a folder of its own."""
    base = make_tiny("llama", root / "base")
    built = {"base": base}
    for family in ("llama", "qwen2", "gpt2", "opt"):
        built[f"config-{family}"] = make_tiny(family, root / f"config-{family}")
        (built[f"config-{family}"] / SINGLE_FILE).unlink()
    built["sharded"] = make_tiny("llama", root / "sharded", max_shard_size="100KB")
    built["single"] = make_tiny("qwen2", root / "single")
    adapter = random_adapter(base, lambda module: (3, 6.0) if module.endswith(("q_proj", "up_proj")) else None)
    for name in ("adapter", "adapter-weights", "provenance"):
        built[name] = save_adapter(root / name, base, adapter)
    for name, method in (("prompt", "prompt"), ("prefix", "prefix"), ("bottleneck", "adapter_h")):
        built[name] = save_learned(root / name, base, method)
    for name in ("manifest", "state", "optimizer"):
        built[name] = save_checkpoint(root / name / "step-4", base, "adapter_h")
    for name in ("tokenizer", "tokenizer-config", "generation"):
        built[name] = tiny_tokenizers.byte_level(root / name, template=tiny_tokenizers.CHATML)
    built["sentencepiece"] = tiny_tokenizers.sentencepiece(root / "sentencepiece").parent
    (built["generation"] / "generation_config.json").write_text('{"eos_token_id": [1, 2], "do_sample": true}')
    for name in ("data", "chats", "yaml", "metrics", "slurm", "hostfile", "options"):
        (root / name).mkdir()
        built[name] = root / name
    (built["data"] / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (built["chats"] / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in CHATS))
    (built["yaml"] / "run.yaml").write_text(yaml.safe_dump(RUN))
    (built["metrics"] / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in RECORDS))
    (built["slurm"] / "variables").write_bytes(_to_words(STEP, built))
    (built["hostfile"] / "command").write_text("\0".join(COMMAND))
    (built["options"] / "options").write_bytes(_to_words(OPTIONS, built))
    for reader in READERS:
        shutil.copyfile(reader.file(built), beside(reader.file(built)))
    return built


ROWS = [{"prompt": f"Question {n}?", "completion": f"Answer {n}.", "id": n} for n in range(4)]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"{n}?"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    for n in range(3)
]
RUN = {
    "model": {"path": "/models/x", "dtype": "bf16"},
    "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "dropout": 0.1},
    "parallel": {"tensor": 2},
    "data": {"train": "/data/train.jsonl", "max_length": 512},
    "train": {"steps": 100, "global_batch": 8, "lr": 0.001, "seed": 7},
    "output": {"dir": "/runs/x", "save_every": 10},
}
RECORDS = [{"step": n, "time": 1.5 * n, "loss": 2.0 / n, "learning_rate": 1e-3} for n in range(1, 6)]
STEP = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "a[07-09]",
}
COMMAND = ["python", "deepspeed", "--hostfile", "hosts", "--num_gpus=8", "launch/train.py", "run.yaml"]
OPTIONS = {"adapter": "run/adapter=0.7", "size": "5GB"}


# --- judges ----------------------------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return type(value).__name__
    return "number" if isinstance(value, int | float) else type(value).__name__


def tree_judge(reader_file: Place_, read: Callable[[Built], Any], idle: frozenset[str], loose: frozenset[str]) -> Any:
    """Return a judge that compares the file with the one that was written.

    idle: keys without effect; loose: keys of any type.
    """
    meanings: dict[Path, Any] = {}

    def judge(built: Built, content: bytes, value: Any) -> str | None:
        path = reader_file(built)
        whole = beside(path).read_bytes()
        try:
            old, new = json.loads(whole), json.loads(content.decode())
        except ValueError as error:
            return f"is no JSON to Python: {error}"
        if path not in meanings:
            path.write_bytes(whole)
            meanings[path] = read(built)
            path.write_bytes(content)
        changed = [at for at in differences(old, new) if str(at[0] if at else "") not in idle]
        if value == meanings[path]:
            silent = [at for at in changed if not _says_the_same(old, new, at) and (at and at[0] in old)]
            return f"changes nothing: {silent}" if silent and len(silent) == len(changed) else None
        for at in changed:
            try:
                before, after = get(old, at), get(new, at)
            except (KeyError, IndexError, TypeError):
                continue
            if after is not None and _kind(before) != _kind(after) and str(at[0]) not in loose and before is not None:
                return f"{at}: {before!r} became {after!r}"
        return None

    return judge


def _says_the_same(old: Any, new: Any, at: tuple[Any, ...]) -> bool:
    """Return whether a key is removed or null, which means its default, or is the same number in another spelling."""
    try:
        after = get(new, at)
    except (KeyError, IndexError, TypeError):
        return True
    try:
        before = get(old, at)
    except (KeyError, IndexError, TypeError):
        return True  # a key that no reader knows
    return after is None or before is None or (_kind(before) == _kind(after) == "number" and before == after)


def rows_judge(built: Built, content: bytes, records: Any) -> str | None:
    """Compare the records that were read with Python's own reading, line by line."""
    rows = records.completions or records.conversations
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    if len(lines) != len(rows):
        return f"{len(rows)} records of {len(lines)} lines"
    for line, row in zip(lines, rows, strict=True):
        said = json.loads(line.decode())
        if records.kind == "completion":
            given = said["completion"] if isinstance(said["completion"], str) else said["completion"][0]
            same = (row.prompt, row.completion) == (said["prompt"], given)
        else:
            texts = [{key: turn.pop(key) for key in ("role", "content")} for turn in said["messages"]]
            # Other keys of a message, which no template shows; empty values do not count.
            rest = [key for turn in said["messages"] for key, value in turn.items() if value not in (None, "", [], {})]
            same = row.messages == texts and set(rest) <= {"model"}
        if not same:
            return f"{row} of {line!r}"
    return None


def yaml_judge(built: Built, content: bytes, config: Any) -> str | None:
    """A changed key of the file changes only the value at that key."""
    old, new = RUN, yaml.load(content.decode(), yaml.BaseLoader)
    before, after = _baseline(built), config.read_keys()
    old = yaml.load(yaml.safe_dump(old), yaml.BaseLoader)
    places = list(differences(old, new or {}))
    for at in differences(before, after):
        if not any(at[: len(place)] == place or place[: len(at)] == at for place in places):
            return f"{at} changed with {places}"
    return None


def _baseline(built: Built) -> Any:
    path = built["yaml"] / "base.yaml"
    path.write_text(yaml.safe_dump(RUN))
    return load_config(path).read_keys()


def header_judge(file: Place_) -> Callable[[Built, bytes, Any], str | None]:
    """Return a judge that compares names, types and shapes with the header, read by Python."""

    def judge(built: Built, content: bytes, found: Any) -> str | None:
        length = int.from_bytes(content[:8], "little")
        said = json.loads(content[8 : 8 + length])
        said.pop("__metadata__", None)
        expected = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in said.items()}
        return None if found == expected else f"{found} of {expected}"

    return judge


def slurm_judge(built: Built, content: bytes, found: Any) -> str | None:
    said = _variables(content)
    if "RANK" not in found:
        return None if not {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= said.keys() else "was passed over"
    same = found["RANK"] == str(int(said["SLURM_PROCID"])) and found["WORLD_SIZE"] == str(
        int(said["SLURM_STEP_NUM_TASKS"])
    )
    inside = int(found["RANK"]) < int(found["WORLD_SIZE"]) and 1024 <= int(found["MASTER_PORT"]) < 32768
    return None if same and inside else f"{found}"


def metrics_judge(built: Built, content: bytes, kept: Any) -> str | None:
    lines = []
    for line in content.split(b"\n"):
        try:
            lines.append(json.loads(line.decode()))
        except (ValueError, RecursionError):
            continue
    lines = [
        {**line, "time": float(line["time"])}
        for line in lines
        if isinstance(line, dict) and "time" in line and _is(line["time"])
    ]
    odd = [record for record in kept if repr(record) not in {repr(line) for line in lines} or not _is(record["step"])]
    return f"kept {odd[0]}" if odd else None


def _is(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 10**308 or isinstance(value, float)


def same_bytes(file: Place_) -> Callable[[Built, bytes, Any], str | None]:
    return lambda built, content, value: None if content == beside(file(built)).read_bytes() else "another file"


def stop_judge(built: Built, content: bytes, found: Any) -> str | None:
    said = json.loads(content).get("eos_token_id")
    ids = said if isinstance(said, list) else [said] if said is not None else []
    wrong = [each for each in ids if isinstance(each, bool) or not isinstance(each, int)]
    return f"{said} gave {sorted(found)}" if wrong or not set(ids) <= found else None


def anything(built: Built, content: bytes, value: Any) -> str | None:
    """Accept everything: only the tokenizers library defines the meaning of a tokenizer.json."""
    return None


# --- readers ---------------------------------------------------------------------------------------------------------


def _in(name: str, file: str) -> Place_:
    return lambda built: built[name] / file


def _json_tree(file: Place_) -> Callable[[Built], Any]:
    return lambda built: json.loads(beside(file(built)).read_bytes())


def json_reader(
    name: str,
    file: Place_,
    read: Callable[[Built], Any],
    modules: tuple[str, ...],
    judge: Any = None,
    idle: frozenset[str] = frozenset(),
    loose: frozenset[str] = frozenset(),
) -> Reader:
    chosen = judge or tree_judge(file, read, idle, loose)
    return Reader(name, file, read, modules, _json_tree(file), lambda tree, built: to_json(tree), chosen)


def lines_reader(
    name: str, file: Place_, read: Callable[[Built], Any], modules: tuple[str, ...], rows: list[Any], judge: Any
) -> Reader:
    def encode(tree: Any, built: Built) -> bytes:
        found = tree if isinstance(tree, list) else [tree]
        return b"".join(to_json(row).replace(b"\n", b" ") + b"\n" for row in found)

    return Reader(name, file, read, modules, lambda built: rows, encode, judge)


def header_reader(
    name: str, file: Place_, read: Callable[[Built], Any], modules: tuple[str, ...], judge: Any
) -> Reader:
    def tree(built: Built) -> Any:
        content = beside(file(built)).read_bytes()
        return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])

    def encode(header: Any, built: Built) -> bytes:
        content = beside(file(built)).read_bytes()
        text = to_json(header)
        return len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]

    return Reader(name, file, read, modules, tree, encode, judge)


def _factors(built: Built, name: str) -> Any:
    adapter = read_adapter(built[name], read_architecture(built["base"]))
    scales = {module: factor.scale(adapter.rslora) for module, factor in adapter.factors.items()}
    sums = {
        module: [each.double().sum().item() for each in factor.tensors] for module, factor in adapter.factors.items()
    }
    return repr(read_config(built[name] / CONFIG_FILE)), sums, scales


def _entries(path: Path) -> Any:
    return {entry.name: (entry.dtype, entry.shape) for entry in read_header(path).entries}


def _weights(folder: Path) -> Any:
    with open_checkpoint(folder) as checkpoint:
        return {name: (checkpoint.shape(name), checkpoint.file(name).name) for name in checkpoint.names()}


def _words(content: bytes) -> list[str]:
    """Return words as Linux passes them to a process: split at zero bytes, not necessarily UTF-8."""
    return [word.decode("utf-8", "surrogateescape") for word in content.split(b"\0") if word]


def _to_words(tree: Any, built: Built) -> bytes:
    """Return a mapping as environment variables, another tree as words."""
    pairs = tree.items() if isinstance(tree, dict) else [("", tree)]
    text = "\0".join(f"{name}={value}".replace("\0", " ") for name, value in pairs)
    return text.encode("utf-8", "surrogatepass")


def _from_slurm(built: Built) -> Any:
    environment = _variables((built["slurm"] / "variables").read_bytes())
    set_rank_variables(environment)
    return environment


def _variables(content: bytes) -> dict[str, str]:
    return dict(word.split("=", 1) for word in _words(content) if "=" in word)


def _options(built: Built) -> Any:
    given = _variables((built["options"] / "options").read_bytes())
    return parse_adapter(given.get("adapter", "")), parse_shard_size(given.get("size", ""))


def _command(built: Built) -> Any:
    """Return the hostfile of a command line, the only one of deepspeed's options that is read."""
    return named_hostfile(_words((built["hostfile"] / "command").read_bytes()))


def words_reader(
    name: str, file: Place_, read: Callable[[Built], Any], modules: tuple[str, ...], tree: Any, judge: Any
) -> Reader:
    return Reader(name, file, read, modules, lambda built: tree, _to_words, judge)


def _read_tokenizer(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    (ids,) = tokenizer.encode(["Question 1? <|im_end|>\n ä"])
    return ids, tokenizer.decode(ids), tokenizer.encode_continuations([" Yes."], ["No."]), tokenizer.eos_id


def _to_yaml(tree: Any, built: Built) -> bytes:
    """Return the tree as YAML in block style, or as JSON, which is flow style, where that cannot be written."""
    try:
        text = yaml.safe_dump(tree, allow_unicode=True)
    except RecursionError:
        return to_json(tree)
    return to_json(tree) if "@" in text else text.encode("utf-8", "surrogatepass")


def _optimizer(built: Built) -> Any:
    path = built["optimizer"] / OPTIMIZER_FILE
    stored = _entries(beside(path))
    shapes = {name.removesuffix(".master"): shape for name, (_, shape) in stored.items() if name.endswith(".master")}
    reader = OptimizerReader(path, shapes)
    for name in shapes:
        reader.get(name)
    return _entries(path)


def _fields(content: bytes) -> list[list[Any]]:
    """Return the fields of a protobuf message: [number and type, bytes], for fields that have a length."""
    found: list[list[Any]] = []
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        assert key & 7 == 2, "a SentencePiece model is made of messages"
        length, at = _varint(content, at)
        found.append([key, content[at : at + length].decode("latin1")])
        at += length
    return found


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (content[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if content[at - 1] < 0x80:
            return value, at


def _to_protobuf(tree: Any, built: Built) -> bytes:
    """Return the protobuf message of these fields; an entry that is no field becomes field 10 with the entry's text."""
    found = b""
    for field in tree if isinstance(tree, list) else [tree]:
        key, payload = field if isinstance(field, list) and len(field) == 2 else (10, field)
        raw = str(payload).encode("latin1", "replace")
        number = key if isinstance(key, int) and 0 <= key < 2**60 else 10
        found += _to_varint(number) + _to_varint(len(raw)) + raw
    return found


def _to_varint(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


ARCH = ("lowrank_dist/arch/config_json.py", "lowrank_dist/arch/keys.py", "lowrank_dist/untrusted/json.py")
PEFT = ("lowrank_dist/methods/lora/peft_config.py", "lowrank_dist/untrusted/patterns.py")
FORMATS = ("lowrank_dist/data/formats.py", "lowrank_dist/untrusted/json.py", "lowrank_dist/untrusted/files.py")
HEADER = ("lowrank_dist/formats/safetensors_file.py",)
_PEFT_IDLE = frozenset(
    "auto_mapping inference_mode peft_version revision megatron_config megatron_core loftq_config eva_config task_type "
    "corda_config lora_ga_config qalora_group_size runtime_config ensure_weight_tying init_lora_weights bias peft_type "
    "modules_to_save".split()
)
READERS: tuple[Reader, ...] = (
    *(
        json_reader(
            f"config.json {family}",
            _in(f"config-{family}", "config.json"),
            lambda built, family=family: read_architecture(built[f"config-{family}"]),  # type: ignore[misc]
            ARCH,
            idle=_CONFIG_IDLE,
        )
        for family in ("llama", "qwen2", "gpt2", "opt")
    ),
    json_reader(
        "plan's config.json",
        _in("single", "config.json"),
        lambda built: find_model(str(built["single"] / "config.json")),
        ("lowrank_dist/arch/model_files.py",),
        idle=_CONFIG_IDLE,
    ),
    json_reader(
        "index",
        _in("sharded", INDEX_FILE),
        lambda built: _weights(built["sharded"]),
        ("lowrank_dist/formats/model_folder.py",),
        idle=frozenset({"metadata"}),
    ),
    header_reader(
        "header",
        _in("single", SINGLE_FILE),
        lambda built: _entries(built["single"] / SINGLE_FILE),
        HEADER,
        header_judge(_in("single", SINGLE_FILE)),
    ),
    json_reader(
        "adapter_config", _in("adapter", CONFIG_FILE), lambda built: _factors(built, "adapter"), PEFT, idle=_PEFT_IDLE
    ),
    header_reader(
        "adapter weights",
        _in("adapter-weights", WEIGHTS_FILE),
        lambda built: _factors(built, "adapter-weights") and _entries(built["adapter-weights"] / WEIGHTS_FILE),
        ("lowrank_dist/methods/lora/files.py",),
        header_judge(_in("adapter-weights", WEIGHTS_FILE)),
    ),
    json_reader(
        "prompt config",
        _in("prompt", CONFIG_FILE),
        lambda built: repr(read_prompt_learning(built["prompt"])),
        ("lowrank_dist/methods/prompt_files.py",),
        idle=_LEARNED_IDLE,
    ),
    json_reader(
        "prefix config",
        _in("prefix", CONFIG_FILE),
        lambda built: repr(read_prompt_learning(built["prefix"])),
        ("lowrank_dist/methods/prompt_files.py",),
        idle=_LEARNED_IDLE,
    ),
    json_reader(
        "bottleneck config",
        _in("bottleneck", "bottleneck_config.json"),
        lambda built: repr(read_bottlenecks(built["bottleneck"])),
        ("lowrank_dist/methods/bottleneck/files.py",),
    ),
    json_reader(
        "provenance",
        _in("provenance", PROVENANCE_FILE),
        lambda built: read_provenance(built["provenance"]),
        ("lowrank_dist/formats/provenance.py",),
        loose=frozenset({"config", "training", "versions"}),
    ),
    json_reader(
        "manifest",
        _in("manifest", MANIFEST_FILE),
        lambda built: read_checkpoint(built["manifest"]),
        ("lowrank_dist/formats/manifest.py",),
        judge=same_bytes(_in("manifest", MANIFEST_FILE)),
    ),
    Reader(
        "manifest written anew",
        _in("manifest", MANIFEST_FILE),
        lambda built: read_checkpoint(built["manifest"]),
        ("lowrank_dist/formats/manifest.py",),
        lambda built: json.loads(beside(built["manifest"] / MANIFEST_FILE).read_bytes())["files"],
        # With a valid digest.
        lambda tree, built: manifest_text(tree).encode("utf-8", "surrogatepass"),
        same_bytes(_in("manifest", MANIFEST_FILE)),
    ),
    json_reader(
        "trainer_state",
        _in("state", STATE_FILE),
        lambda built: read_state(built["state"] / STATE_FILE),
        ("lowrank_dist/checkpoint/training_state.py",),
        loose=frozenset({"config", "rng"}),
    ),
    json_reader(
        "tokenizer.json",
        _in("tokenizer", "tokenizer.json"),
        lambda built: _read_tokenizer(built["tokenizer"]),
        ("lowrank_dist/data/tokenizer.py",),
        judge=anything,
    ),
    json_reader(
        "tokenizer_config",
        _in("tokenizer-config", "tokenizer_config.json"),
        lambda built: _read_tokenizer(built["tokenizer-config"]),
        ("lowrank_dist/data/tokenizer.py",),
        judge=anything,
    ),
    json_reader(
        "generation_config",
        _in("generation", "generation_config.json"),
        lambda built: set(read_stop_ids(built["generation"])),
        ("lowrank_dist/formats/text_files.py",),
        judge=stop_judge,
    ),
    lines_reader(
        "completions",
        _in("data", "data.jsonl"),
        lambda built: read_jsonl(built["data"] / "data.jsonl", Use.EVALUATION),
        FORMATS,
        ROWS,
        rows_judge,
    ),
    lines_reader(
        "messages",
        _in("chats", "data.jsonl"),
        lambda built: read_jsonl(built["chats"] / "data.jsonl"),
        FORMATS,
        CHATS,
        rows_judge,
    ),
    lines_reader(
        "metrics",
        _in("metrics", "metrics.jsonl"),
        lambda built: keep_records(built["metrics"] / "metrics.jsonl", 4),
        ("lowrank_dist/engine/reporter.py",),
        RECORDS,
        metrics_judge,
    ),
    Reader(
        "run.yaml",
        _in("yaml", "run.yaml"),
        lambda built: load_config(built["yaml"] / "run.yaml"),
        ("lowrank_dist/config/load.py", "lowrank_dist/sections/scalars.py"),
        lambda built: RUN,
        _to_yaml,
        yaml_judge,
    ),
    Reader(
        "tokenizer.model",
        _in("sentencepiece", "tokenizer.model"),
        lambda built: _read_tokenizer(built["sentencepiece"]),
        ("lowrank_dist/data/sentencepiece_model.py",),
        lambda built: _fields(beside(built["sentencepiece"] / "tokenizer.model").read_bytes()),
        _to_protobuf,
        anything,
    ),
    header_reader(
        "optimizer",
        _in("optimizer", OPTIMIZER_FILE),
        _optimizer,
        ("lowrank_dist/checkpoint/training_state.py", *HEADER),
        header_judge(_in("optimizer", OPTIMIZER_FILE)),
    ),
    words_reader(
        "Slurm's variables",
        _in("slurm", "variables"),
        _from_slurm,
        ("lowrank_dist/backend/launchers.py",),
        STEP,
        slurm_judge,
    ),
    words_reader(
        "deepspeed's words",
        _in("hostfile", "command"),
        _command,
        ("lowrank_dist/backend/launchers.py",),
        COMMAND,
        anything,
    ),
    words_reader(
        "options of merge", _in("options", "options"), _options, ("lowrank_dist/merging/options.py",), OPTIONS, anything
    ),
    json_reader(
        "inspect",
        _in("adapter", PROVENANCE_FILE),
        lambda built: json.dumps(inspected(built["adapter"], built["base"]).to_json()),
        ("lowrank_dist/checkpoint/inspect_trained.py",),
        judge=anything,
    ),
)
