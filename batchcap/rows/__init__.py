"""OUTPUT: rows committed, indexed, merged and mirrored in a store. Knows no photos, no models."""
