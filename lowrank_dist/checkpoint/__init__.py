"""PEFT adapters in and out, the base's fingerprint, and the offline merge. No process group, no GPU."""
