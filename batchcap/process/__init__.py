"""The process itself: signals, logs, progress, memory, environment, wording of counts and names."""
