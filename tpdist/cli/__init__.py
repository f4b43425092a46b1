"""The `tpdist` command: frame.py holds the group and turns errors into exit codes, options.py makes flags of settings,
and every command has a file of its own."""
