"""Report of one or several runs as one HTML file: read the records, summarize and draw them."""
