"""What runs have shown: rows and their averages, figures, and one page that holds everything."""
