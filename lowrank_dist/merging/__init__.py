"""The offline merge of low-rank updates into a base model, tensor by tensor. No process group, no GPU."""
