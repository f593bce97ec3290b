"""The version that checkpoints and reports name."""

VERSION = "0.1.0"
