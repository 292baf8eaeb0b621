"""The export stage: plan, corrections and checkpoint in, verified artifact directories out."""
