"""A run, or several, told in one HTML file: what was recorded is read, summed up and drawn. Nothing trains here."""
