"""References and predictions in other programs' formats: read, matched, exported."""
