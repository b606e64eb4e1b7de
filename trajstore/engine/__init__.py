"""What moves rows: commits and their visibility on one side, the gather on the other."""
