"""What is common to files: model folders, safetensors, atomic writes, manifest, fingerprint and provenance."""
