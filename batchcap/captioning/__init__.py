"""Photos to rows: runs and their engines, captions on the terminal, and the benchmark."""
