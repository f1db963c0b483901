"""Parameters as blocks, blocks in stacks, their factors and their saved state."""
