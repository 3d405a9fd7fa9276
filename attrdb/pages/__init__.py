"""HTML pages with pictures and plots, each in one file."""
