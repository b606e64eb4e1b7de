"""Bytes by key, durable: the storage port, shards and files."""
