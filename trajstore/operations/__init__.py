"""What is done to whole stores: verify, repair, merge, split, delete, derive, compact."""
