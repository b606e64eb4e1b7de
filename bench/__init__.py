"""Measurements of trajstore beside its peers: ``python -m bench``."""
