"""Fuzzing: hostile arguments, files and databases against the command line, in processes of their own."""
