"""Building blocks of configuration sections: base models, field types, YAML scalars. Imports only `untrusted`."""
