"""Low-rank updates on the linears (Hu et al. 2021)."""
