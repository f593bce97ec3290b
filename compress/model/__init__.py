"""What a model looks like: from its headers alone (layout), and as modules on the meta device (skeleton, replay)."""
