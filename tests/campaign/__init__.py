"""Campaigns that try to break the store: power failures, failing disks, kills, zombies, hostile bytes.

``python -m tests.campaign --help`` runs them for as long as wanted; the test suite runs each for some seconds.
"""
