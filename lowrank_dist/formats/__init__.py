"""The parts that all files share: model folders, safetensors, atomic writes, manifest, fingerprint and provenance."""
