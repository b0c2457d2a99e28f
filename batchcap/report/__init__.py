"""The report page: cards of rows, thumbnails of photos, and the page itself."""
