"""The text files of a model: its tokenizer, its chat template, and the ids that end a text.

They accompany what was trained: in checkpoints and adapter folders as training used them, and in merged models.
Tokenizer files are only copied here, never built; two tokenizers are compared by meaning, not by bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_dist.arch.keys import is_integer
from lowrank_dist.arch.model_files import CONFIG_FILE, GENERATION_FILE, TOKENIZER_CONFIG_FILE
from lowrank_dist.errors import UserError
from lowrank_dist.formats.paths import require_copyable
from lowrank_dist.untrusted.files import MIB, read_bytes, read_text, short_path
from lowrank_dist.untrusted.json import JsonError, brief, parse_json, read_object

_FAST, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# Files of a SentencePiece tokenizer beside its model. tokenizer.json is not among them: it would replace the model.
_BESIDE = (TOKENIZER_CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", _TEMPLATE, "chat_template.json")
TOKENIZER_FILES = (_FAST, _SENTENCEPIECE, *_BESIDE, "vocab.json", "merges.txt", "vocab.txt", "tekken.json")
TEXT_FILES = (*TOKENIZER_FILES, GENERATION_FILE)
# Keys that transformers takes from config.json where there is no generation_config.json.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MEND = "correct it, or remove it"
# Defaults of the tokenizers library for keys that older files lack. It writes them when it saves a file anew.
_DEFAULTS: Mapping[str, Any] = {
    **{"type": "BPE", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
    **{"use_regex": True, "split": True},
}
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_LARGEST = 256 * MIB  # limit for one file; the largest published tokenizer.json has 33 MiB

Tokenizer = Mapping[str, bytes]


def locate_tokenizer(path: Path) -> Path:
    """Return the folder of a tokenizer.json, or the file of a bare SentencePiece model, for a folder or such a file.

    It is the choice of `data.tokenizer.load_tokenizer`. The result need not exist.
    """
    folder = path.parent if path.name == _FAST else path
    if (folder / _FAST).is_file():
        return folder
    return path if path.is_file() else path / _SENTENCEPIECE


def has_tokenizer(path: Path) -> bool:
    """Return whether `read_tokenizer` finds a tokenizer at a path."""
    return locate_tokenizer(path).exists()


def tokenizer_digest(path: Path) -> str:
    """Return the SHA-256 (64 hex digits) of the tokenizer's files. Raises as `read_tokenizer` does."""
    digest = hashlib.sha256()
    for name, content in read_tokenizer(path).items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def read_tokenizer(path: Path) -> Tokenizer:
    """Return file name → content of the tokenizer at a path (see `locate_tokenizer`).

    Raises UserError where there is none, and for a link to a file that does not belong to a tokenizer (see
    `require_copyable`).
    """
    place = locate_tokenizer(path)
    if not place.exists():
        raise UserError(f"{path}: no tokenizer; give a folder with {_FAST} or {_SENTENCEPIECE}")
    if place.is_dir():
        files = {name: place / name for name in TOKENIZER_FILES}
    else:
        files = {_SENTENCEPIECE: place} | {name: place.parent / name for name in _BESIDE}
    there = {name: require_copyable(file, file.parent, TEXT_FILES) for name, file in files.items() if file.exists()}
    return {name: read_bytes(file, _MEND, largest=_LARGEST) for name, file in there.items()}


def text_files(folder: Path) -> list[str]:
    """Return the names of the text files in an adapter folder."""
    return [name for name in TEXT_FILES if (folder / name).exists()]


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether two tokenizers split texts and render chats in the same way.

    Their files are compared by meaning, not byte by byte. If only one tokenizer has a tokenizer.json, that file is
    assumed to be converted from the SentencePiece model, which both must have.
    """
    if one == other or (_FAST in one) == (_FAST in other):
        return one == other or _meaning(one) == _meaning(other)
    definition = _object(one if _FAST in one else other, _FAST)
    model, *rest = [
        [files.get(_SENTENCEPIECE), _added_tokens(definition, files), *_said_beside(files)] for files in (one, other)
    ]
    return model[0] is not None and [model] == rest


def tokenizer_of_adapter(adapter: Path | None, model: Path) -> Path:
    """Return the folder of the tokenizer that an adapter was trained with.

    It is the adapter's if the adapter has one that differs from the model's, else the model's.
    """
    if adapter is None or not has_tokenizer(adapter):
        return model
    if has_tokenizer(model) and same_tokenizer(read_tokenizer(adapter), read_tokenizer(model)):
        return model
    return adapter


def note_on_base_tokenizer(tokenizer: Path, base: Path) -> list[str]:
    """Return a note where a run's tokenizer.json is not its base's: the same ids may be other tokens there."""
    if not has_tokenizer(base):
        return []
    ours, theirs = read_tokenizer(tokenizer), read_tokenizer(base)
    if _FAST not in ours or _FAST not in theirs or ours[_FAST] == theirs[_FAST]:
        return []
    if _meaning(ours)[0] == _meaning(theirs)[0]:
        return []
    return [
        f"data.tokenizer: {tokenizer} maps text to other token ids than {base}, and the base cannot read those; "
        "leave data.tokenizer out, unless tokens were only added"
    ]


def note_on_adapter_tokenizer(adapter: Path, tokenizer: Path) -> list[str]:
    """Return a note where the adapter that a run starts from was trained with another tokenizer than the run's."""
    if not has_tokenizer(adapter) or same_tokenizer(read_tokenizer(adapter), read_tokenizer(tokenizer)):
        return []
    return [
        f"{adapter}: trained with another tokenizer or chat template than this run's {tokenizer}; to keep the "
        "adapter's own, set data.tokenizer to its folder"
    ]


def _meaning(files: Tokenizer) -> list[Any]:
    if _FAST not in files:
        added = [_object(files, "added_tokens.json"), _object(files, TOKENIZER_CONFIG_FILE).get("added_tokens_decoder")]
        return [files.get(_SENTENCEPIECE), added, *_said_beside(files)]
    definition = _object(files, _FAST)
    own = {"truncation": None, "padding": None, "added_tokens": None}
    return [_canonical(definition | own), _added_tokens(definition, files), *_said_beside(files)]


def _said_beside(files: Tokenizer) -> list[Any]:
    """Return chat template, BOS, EOS, split_special_tokens, and whether BOS is put before a text."""
    settings = _object(files, TOKENIZER_CONFIG_FILE)
    template = files[_TEMPLATE].decode(errors="replace") if _TEMPLATE in files else settings.get("chat_template")
    special = [_content(settings.get(name)) for name in ("bos_token", "eos_token")]
    bos = _FAST in files or settings.get("add_bos_token") is not False
    return [template, *special, bool(settings.get("split_special_tokens")), bos]


def _added_tokens(definition: Mapping[str, Any], files: Tokenizer) -> dict[str, Any]:
    """Return the tokens that are matched before a text is cut: token → id and flags, None where only its name is given.

    They come from tokenizer.json and the files beside it, as transformers reads them: a tokenizer_config.json that has
    added_tokens_decoder overrides the older files.
    """
    named = _object(files, TOKENIZER_CONFIG_FILE)
    listed, decoder = definition.get("added_tokens"), named.get("added_tokens_decoder")
    said: list[Any] = list(listed) if isinstance(listed, list) else []
    names: list[Any] = []
    if isinstance(decoder, dict):
        said += [{**token, "id": key} for key, token in decoder.items() if isinstance(token, dict)]
    else:
        named = named | _object(files, "special_tokens_map.json")
        names += _object(files, "added_tokens.json")
    tokens: dict[str, Any] = {}
    for token in said:
        if isinstance(name := _content(token), str) and isinstance(token, dict):
            tokens[name] = [str(token.get("id")), *(bool(token.get(flag)) for flag in _FLAGS)]
    names += [value for key, value in named.items() if key.endswith("_token")]
    for more in (named.get("additional_special_tokens"), named.get("extra_special_tokens")):
        names += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    for name in map(_content, names):
        if isinstance(name, str):
            tokens.setdefault(name)
    return tokens


def _canonical(part: Any) -> Any:
    """Return a part of tokenizer.json in canonical form: without defaults, and with merges as newer files have them."""
    if isinstance(part, list):
        return [_canonical(inner) for inner in part]
    if not isinstance(part, dict):
        return part
    # Older files have it beside prepend_scheme, where it has no effect.
    void = {"add_prefix_space"} if "prepend_scheme" in part else set()
    canonical = {
        key: value if key in ("vocab", "merges") else _canonical(value)
        for key, value in part.items()
        if value is not None and key not in void and not (key in _DEFAULTS and value == _DEFAULTS[key])
    }
    if isinstance(merges := canonical.get("merges"), list):
        canonical["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    return canonical


def _object(files: Tokenizer, name: str) -> dict[str, Any]:
    try:
        found = parse_json(files.get(name, b"{}"))
    except JsonError as error:
        raise UserError(f"{name} of the tokenizer is not valid JSON ({error}); {_MEND}") from error
    return found if isinstance(found, dict) else {}


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def end_of_text(files: Tokenizer) -> tuple[int, ...]:
    """Return the id of tokenizer_config.json's eos_token among tokenizer.json's added tokens; empty without one."""
    eos, definition = _content(_object(files, TOKENIZER_CONFIG_FILE).get("eos_token")), _object(files, _FAST)
    added = definition.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    ids: list[Any] = [token.get("id") for token in tokens if token.get("content") == eos]
    return tuple(filter(is_integer, ids[:1]))


def _largest_id(files: Tokenizer) -> int:
    """Return the largest id in the vocabulary of a tokenizer.json, -1 where there is none.

    Added tokens do not count: a Llama 2 with one for padding has its id beyond the model's last row, and no text is
    encoded to it.
    """
    model = _object(files, _FAST).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        return max(filter(is_integer, vocab.values()), default=-1)
    return len(vocab) - 1 if isinstance(vocab, list) else -1


def read_stop_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids in eos_token_id of a folder's generation_config.json, or else of its config.json."""
    for name in (GENERATION_FILE, CONFIG_FILE):
        path = folder / name
        if path.is_file():
            eos = read_object(path, _MEND).get("eos_token_id")
            if eos is not None:
                given = eos if isinstance(eos, list) else [eos]
                if not all(map(is_integer, given)):
                    what = f"must be a token id or a list of token ids, not {brief(eos)}"
                    raise UserError(f"{short_path(path)}: eos_token_id {what}; {_MEND}")
                return tuple(given)
    return ()


@dataclass(frozen=True)
class TextFiles:
    """The text files that accompany a trained model.

    tokenizer: its files, empty where the folder keeps its own. ends: ids that end a text, for eos_token_id. generation:
    text of generation_config.json for an adapter's folder, which has no config.json; None where it needs none.
    """

    tokenizer: Tokenizer
    ends: tuple[int, ...]
    generation: str | None = None

    @classmethod
    def of_run(cls, tokenizer: Path, base: Path, ends: Iterable[int]) -> TextFiles:
        """Return the text files of a run's checkpoints. ends: the ids that its samples end in."""
        return cls(read_tokenizer(tokenizer), tuple(ends), _generation(base, ends))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files in an adapter's folder."""
        return (*self.tokenizer, *(() if self.generation is None else (GENERATION_FILE,)))

    def write(self, folder: Path) -> None:
        """Write the files into an adapter's folder, or into a model folder in place of the base's."""
        if self._replaces(folder):
            for name in TOKENIZER_FILES:
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / _TEMPLATES, ignore_errors=True)
            for name, content in self.tokenizer.items():
                (folder / name).write_bytes(content)
        if (folder / CONFIG_FILE).is_file():
            self._complete(folder)
        elif self.generation is not None:
            (folder / GENERATION_FILE).write_text(self.generation, encoding="utf-8")

    def changes(self, base: Path) -> list[str]:
        """Return a line for each difference that a model folder will have from its base."""
        lines = []
        if self._replaces(base):
            lines.append(f"the tokenizer or chat template is not that of {base}")
        if missing := missing_end_ids(base, self.ends):
            lines.append(
                f"eos_token_id has {', '.join(map(str, missing))} in addition to those of {base}, because the "
                "training texts end in it"
            )
        return lines

    def _replaces(self, folder: Path) -> bool:
        if not self.tokenizer:
            return False
        return not has_tokenizer(folder) or not same_tokenizer(read_tokenizer(folder), self.tokenizer)

    def _complete(self, folder: Path) -> None:
        """Add the missing ends to eos_token_id of a model folder, in the file that has that key."""
        if missing_end_ids(folder, self.ends):
            path = folder / GENERATION_FILE
            if not path.is_file() and read_stop_ids(folder):
                path = folder / CONFIG_FILE
            path.write_text(_with_ends(path, folder, self.ends), encoding="utf-8")


def missing_end_ids(folder: Path, ends: Iterable[int]) -> list[int]:
    """Return the ids among `ends` that are no stop tokens in a model folder's files (`read_stop_ids`)."""
    known = read_stop_ids(folder)
    return [end for end in dict.fromkeys(ends) if end not in known]


def _generation(base: Path, ends: Iterable[int]) -> str | None:
    """Return the text of the base's generation_config.json with the ends added; None where none is needed."""
    path, ends = base / GENERATION_FILE, tuple(ends)
    if missing_end_ids(base, ends):
        return _with_ends(path, base, ends)
    return read_text(path, _MEND, largest=_LARGEST) if path.is_file() else None


def _with_ends(path: Path, folder: Path, ends: Iterable[int]) -> str:
    """Return the text of `path`, a model folder's file for eos_token_id, with the ends added. It need not exist."""
    if path.is_file():
        settings = read_object(path, _MEND)
    else:
        config = read_object(folder / CONFIG_FILE, _MEND)
        settings = {key: config[key] for key in _TOKEN_IDS if key in config}
    ids = [*read_stop_ids(folder), *missing_end_ids(folder, ends)]
    settings["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    # With this key transformers would use config.json's ids.
    settings.pop("_from_model_config", None)
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def merged_text_files(adapters: Collection[Path], tokenizer: Path | None, vocab: int) -> TextFiles:
    """Return the text files of a merge: those of the given tokenizer, else of the one beside the adapters.

    Their ends are the stop ids of the adapters and of a given tokenizer folder, and the tokenizer's EOS. Ids of at
    least `vocab`, the number of the model's ids, are left out. Raises UserError where adapters were trained with
    different tokenizers and none is given, and where the given one cannot be the model's.
    """
    if tokenizer is not None:
        files = read_tokenizer(tokenizer)
        if (largest := _largest_id(files)) >= vocab:
            raise UserError(
                f"--tokenizer {short_path(tokenizer)}: its vocabulary has ids up to {largest}, but the model has "
                f"{vocab} embedding rows; give the tokenizer that the adapter was trained with"
            )
    else:
        held = {path: read_tokenizer(path) for path in adapters if has_tokenizer(path)}
        files = next(iter(held.values()), {})
        for path, other in held.items():
            if not same_tokenizer(files, other):
                raise UserError(
                    f"{next(iter(held))} and {path} have different tokenizers or chat templates; give the one for "
                    "the merged model as --tokenizer DIR"
                )
    given = [] if tokenizer is None or not tokenizer.is_dir() else [tokenizer]
    ends = [end for folder in (*adapters, *given) for end in read_stop_ids(folder)]
    return TextFiles(files, tuple(end for end in (*ends, *end_of_text(files)) if end < vocab))


def unknown_end_ids(base: Path, ends: Iterable[int]) -> list[int]:
    """Return the ids among `ends` that end no text of the base: neither its stop tokens nor its tokenizer's EOS."""
    missing = missing_end_ids(base, ends)
    own = end_of_text(read_tokenizer(base)) if missing and has_tokenizer(base) else ()
    return [end for end in missing if end not in own]


def reasons_not_served(adapter: Path, base: Path | None, new_ends: Iterable[int], target: str) -> list[str]:
    """Return the reasons, with remedies, why a server of base and adapter would tokenise or end texts differently.

    base: its folder, None where it is not at hand. new_ends: the ends that the base lacked when the adapter was trained
    on it. target: the server's name.
    """
    reasons = []
    ours = read_tokenizer(adapter) if has_tokenizer(adapter) else {}
    if missing := list(new_ends) if base is None else unknown_end_ids(base, new_ends):
        named = [f"{end} ({token!r})" if (token := token_of(ours, end)) else str(end) for end in missing]
        reasons.append(
            f"its training texts end in token {', '.join(named)}, which is not in eos_token_id of the base's "
            "generation_config.json, so generation would not stop; merge it into the base with lowrank-dist merge, "
            "or add the token there"
        )
    if base is not None and ours and has_tokenizer(base) and not same_tokenizer(ours, read_tokenizer(base)):
        reasons.append(
            f"it was trained with another tokenizer or chat template than that of {base}, which {target} reads; "
            "merge it into the base with lowrank-dist merge"
        )
    return reasons


def token_of(files: Tokenizer, token_id: int) -> str | None:
    """Return the token of an id in a tokenizer.json; None for an id without a token."""
    definition = _object(files, _FAST)
    added, model = definition.get("added_tokens"), definition.get("model")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("id") == token_id:
            return str(token.get("content"))
    vocab = model.get("vocab") if isinstance(model, dict) else None
    return next((name for name, at in vocab.items() if at == token_id), None) if isinstance(vocab, dict) else None
