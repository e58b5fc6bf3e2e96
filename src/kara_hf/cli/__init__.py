"""The `kara-hf` command: one file per subcommand, options they share in `options`."""
