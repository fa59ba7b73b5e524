"""What the reproductions of papers have in common: files, data, a run under way, checks, the command line."""
