"""Modules with the names and files of the systems that users come from."""
