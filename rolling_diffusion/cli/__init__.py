"""The command line: arguments, progress, files."""
