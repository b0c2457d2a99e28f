"""Annotated photos to a model directory."""
