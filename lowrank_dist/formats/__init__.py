"""Code that all file formats share: model folders, safetensors, atomic writes, manifests, fingerprints, provenance."""
