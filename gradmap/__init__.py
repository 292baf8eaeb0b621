"""The pruning stage: checkpoint and calibration text in, plan and corrections out."""
