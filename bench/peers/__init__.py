"""The peers, one file each, set up as their own documentation advises."""
