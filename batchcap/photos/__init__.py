"""INPUT: photos listed, read and decoded, or rejected with a reason."""
