"""The format as values: names, schema, manifest, encodings; no I/O."""
