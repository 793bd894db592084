"""Command line: argument parsing, one file per subcommand, no logic."""
