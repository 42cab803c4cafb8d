"""From JSONL to microbatches: formats, tokenizers, chat templates, masking, packing, loader. Uses no process group."""
