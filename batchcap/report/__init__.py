"""What a report shows: rows to cards, photos to small pictures, and the page that holds them."""
