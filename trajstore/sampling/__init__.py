"""Which rows a learner gets next: orders, windows, priorities, replay."""
