"""Other formats into a store: one file each, which know nothing of one another."""
