"""The material that configuration sections are made of: the base model, field types, YAML's scalars. A leaf room."""
