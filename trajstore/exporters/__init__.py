"""A dataset into other formats: one file each, which know nothing of one another."""
