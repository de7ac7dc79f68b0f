"""The command line: the sections every recipe has, flags, YAML files, presets."""
