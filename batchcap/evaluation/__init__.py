"""Captions to scores. Knows no photos and no models."""
