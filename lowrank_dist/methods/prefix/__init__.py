"""Prefix tuning: trained keys and values at virtual positions of every layer (Li & Liang 2021)."""
