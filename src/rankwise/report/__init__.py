"""Report: numbers → one static page that opens from a file, without a network."""
