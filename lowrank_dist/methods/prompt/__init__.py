"""Prompt tuning: trained embeddings at virtual positions of the input (Lester et al. 2021)."""
