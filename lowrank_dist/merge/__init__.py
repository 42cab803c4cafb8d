"""The offline merge: low-rank updates folded into a base, tensor by tensor. No process group, no GPU."""
