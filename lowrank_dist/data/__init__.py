"""JSONL in, microbatches out: formats, tokenizers, templates, masking, packing, loader. Knows no process group."""
