"""Tokenizer folders made on the spot: byte-level BPE, Llama 2's dummy-prefix BPE, SentencePiece; and chat templates."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "system user assistant You are a helpful assistant.",
    "what is the capital of France? It is Paris.",
    "Hello world, hello again and again!",
    "Q: 2 + 2\nA: 4\n\nQ: 3 + 4\n\nA: 7",
    "  indented\n    code = call(value)\n",
    "done\n\n",  # makes "\n\n" one token of GPT-2's kind, which may span the beginning of a turn
] * 4

CHATML = (  # SmolLM2-Instruct's: a default system prompt, generation prompt on demand
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (  # one BOS a round, the system prompt inside the first user turn, no generation prompt
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles!') }}"
    "{% endif %}{% endfor %}"
)
# As Qwen3's: only the last turn keeps its (empty) thinking block.
DROPS_THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1-Distill's: the generation prompt opens a block that is left out of earlier turns.
PROMPTS_THINKING = CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n' }}")
ALPACA = (  # no token ends a turn
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
EOS_ONLY_AT_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# Unlike GPT-2's, it keeps newlines together whatever follows them.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>", "<|start_header_id|>", "<|end_header_id|>"]


def byte_level(
    folder: Path,
    *,
    template: str | None = None,
    eos: str | None = "<|endoftext|>",
    pad: str | None = None,
    bos: bool = False,
    trim_offsets: bool = True,
    pattern: str | None = None,
    prefix_space: bool = False,
) -> Path:
    """Write a tokenizer like GPT-2's. bos: add <|bos|> before a text and <|endoftext|> after it (readers remove it).

    pattern: the expression that splits words, by default GPT-2's. prefix_space: add a space before a text.
    """
    tokenizer = Tokenizer(models.BPE())
    words = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*words, pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not words)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[*_SPECIALS, "<|eot_id|>"]
    )
    tokenizer.train_from_iterator(SENTENCES, trainer, length=len(SENTENCES))
    steps: list[object] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        ids = [(name, tokenizer.token_to_id(name)) for name in ("<|bos|>", "<|endoftext|>")]
        steps.append(processors.TemplateProcessing(single="<|bos|> $A <|endoftext|>", special_tokens=ids))
    tokenizer.post_processor = processors.Sequence(steps)
    settings = {"eos_token": eos, "pad_token": pad, "bos_token": "<|bos|>" if bos else None}
    return _save(folder, tokenizer, settings, template)


def dummy_prefix(
    folder: Path, *, template: str | None = None, metaspace: bool = False, scheme: str | None = None
) -> Path:
    """Llama 2's kind: "▁" for a space and one before every text, byte fallback, BOS.

    A Prepend normalizer adds the space, after every special token too. metaspace: the prepend_scheme (such as "first")
    of a Metaspace pre-tokenizer that adds it instead.
    """
    metaspace = metaspace or scheme is not None
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(SENTENCES, trainer, length=len(SENTENCES))
    # As in Llama 2's file: the byte pieces are plain vocabulary, and only three tokens are added tokens.
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    if not metaspace:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(folder, tokenizer, {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}, template)


def _save(folder: Path, tokenizer: Tokenizer, settings: dict[str, str | None], template: str | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    given = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **given}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def byte_level_llama3(folder: Path, *, template: str | None = None) -> Path:
    """Write the tokenizer of `byte_level` with Llama 3's expression for words."""
    return byte_level(folder, template=template, pattern=LLAMA3_PATTERN)


def add_token(folder: Path, content: str, *, special: bool) -> int:
    """Add one token to a folder's tokenizer.json; return its id."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(content, special=special, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.token_to_id(content)


def sentencepiece(folder: Path, *, llama: bool = True, symbols: Sequence[str] = ()) -> Path:
    """Write a tokenizer.model: Llama's settings (BPE, byte fallback, no normalization) or the defaults (unigram, NFKC).

    symbols: more user-defined symbols of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    as_llama = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "vocab_size": 340,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        user_defined_symbols=list(symbols),
        **(as_llama if llama else {"vocab_size": 90}),
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path
