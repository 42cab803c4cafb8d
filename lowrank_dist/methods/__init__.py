"""The fine-tuning methods: low-rank updates and the methods compared with them, on the same model, data and loop."""
